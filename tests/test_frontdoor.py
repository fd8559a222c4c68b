"""The command line: help without slow imports, free text unchanged, one-line errors, and exit statuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from front import Front, one_line, write_data
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import localization_heads as lh
from localization_heads.apps import frontdoor
from localization_heads.apps.frontdoor import CommandLine, help_text, quote_free_text, run
from localization_heads.errors import UsageError, WorkError
from localization_heads.options.compose import compose_options, default_choices, option_names
from localization_heads.options.declaration import option_metadata, read_as
from localization_heads.options.programs import FinderOptions
from localization_heads.store.paths import local_path

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "finder": "localization_heads_finder.py",
    "visualize": "visualize_attention.py",
    "chat": "cli_llava.py",
}


def finder_options(*overrides: str) -> FinderOptions:
    """The composed options of a command line."""
    options = compose_options("finder", *map(quote_free_text, overrides))
    assert isinstance(options, FinderOptions)
    return options


def options_of_kind(*kinds: str) -> list[str]:
    """The finder's options that are read as one of these kinds (`reads`)."""
    return [name for name, field in option_names("finder").items() if read_as(field) in kinds]


def parsed(argument: str) -> Any:
    """The value of a quoted argument after Hydra's grammar and OmegaConf's interpolation."""
    override = OverridesParser.create().parse_override(quote_free_text(argument))
    return OmegaConf.to_container(OmegaConf.create({"value": override.value()}), resolve=True)["value"]


def run_python(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


# ------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing of Hydra's own."""
    assert run(lambda _: 1, name, f"python {SCRIPTS[name]}", ["--help"]) == 0
    text, err = capsys.readouterr()
    assert not err
    assert text.startswith(f"usage: python {SCRIPTS[name]} [-q | -v] [--version] [NAME=VALUE ...]")
    for option in [*option_names(name), *default_choices(name)]:
        assert f"\n{option}: " in text, option
    assert "hydra" not in text
    assert "_self_" not in text


IMPORT_PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "hydra", "omegaconf", "numpy", "matplotlib", "PIL"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


CONSOLE_SCRIPT = """
import sys
from localization_heads.apps.finder import finder
sys.argv[0] = "/usr/bin/locheads"
finder()
"""


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ([str(ROOT / "visualize_attention.py")], "python visualize_attention.py"),
        (["-m", "localization_heads"], "python -m localization_heads"),
        (["-m", "localization_heads.apps.finder"], "python -m localization_heads.apps.finder"),
        (["-c", CONSOLE_SCRIPT], "locheads"),
    ],
)
def test_help_shows_the_command_as_typed(typed: list[str], shown: str) -> None:
    assert run_python(*typed, "--help").stdout.startswith(f"usage: {shown} [-q | -v]")


def test_the_version_is_one_line(front: Front) -> None:
    assert front.finder("--version") == (0, f"localization-heads {lh.__version__}\n", "")


def test_the_examples_are_found_outside_the_repository(front: Front) -> None:
    """They are part of the package; a folder `examples` of the user takes precedence."""
    status, out, _ = front.finder("stage=ground", "image_file=examples/images/cat.jpg", "query=x", "save_id=one")
    assert status == 0
    assert "one" in out
    Path("examples").mkdir()
    Path("examples/mine.jsonl").write_text("{}")
    assert local_path("examples/mine.jsonl") == Path("examples/mine.jsonl")
    assert "no entry could be used" in front.finder("data_file=examples/mine.jsonl").err


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_help_imports_nothing_heavy(script: str) -> None:
    result = run_python("-c", IMPORT_PROBE, str(ROOT / script), "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")


def test_the_package_imports_nothing_heavy() -> None:
    code = """
import sys, localization_heads as lh
dir(lh)
sys.exit(len({"torch", "numpy", "hydra", "PIL"} & set(sys.modules)))
"""
    assert run_python("-c", code).returncode == 0


# -------------------------------------------------------------------------------------------- free text


TYPED = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)


ODD_TEXTS = [
    "the dog, on the left", "a=b, c={d: [e]}", 'it\'s "that" one', '"this" or "that"', "'the dog'", '"', "'",
    "ends in \\", "\\'", "${oc.env:HOME}", "\\${oc.env:HOME}", "\\\\${x}\\", "$", "5", "true", "???", "a\nb\tc",
    " spaces ", "C:\\images\\cat.png", "https://a.example/x.png?a=1,2&b={c}",
]  # fmt: skip


def with_odd_texts(test: Callable[..., None]) -> Callable[..., None]:
    """Add each of `ODD_TEXTS` as an example."""
    return reduce(lambda test, text: example(text=text, name="query")(test), ODD_TEXTS, test)


@settings(max_examples=200)
@given(text=TYPED, name=st.sampled_from(options_of_kind("text", "path")))
@with_odd_texts
def test_free_text_is_passed_unchanged(text: str, name: str) -> None:
    """Except null, and text that the user has quoted for Hydra."""
    value = parsed(f"{name}={text}")
    if text == "null":
        assert value is None
    elif re.fullmatch(r"""'[^'\\]+'|"[^"\\]+\"""", text):
        assert value == text[1:-1]
    else:
        assert value == text


@pytest.mark.parametrize(
    "argument", ["k=5", "heads=[]", "--info", "model=tiny", "query", "query=", "query=null", "exclude=null"]
)
def test_only_free_text_is_quoted(argument: str) -> None:
    assert quote_free_text(argument) == argument


ITEM = TYPED.filter(lambda text: "," not in text and text == text.strip() and text[0] not in "'\"")


@settings(max_examples=100)
@given(items=st.lists(ITEM, min_size=1, max_size=3), name=st.sampled_from(["exclude", "heads"]))
@example(items=["a b=c.jsonl", "it's.jsonl", "${x}#[1].jsonl", "e]"], name="exclude")
def test_each_text_of_a_list_is_passed_unchanged(items: list[str], name: str) -> None:
    assert parsed(f"{name}=[{','.join(items)}]") == items


def test_heads_take_a_path_as_free_text_or_a_list() -> None:
    """A path, and a quoted item of a list, may contain an equals sign, a comma or a space."""
    for value, expected in (
        ("out/a=b, c/heads.json", "out/a=b, c/heads.json"),
        ("[1-2,L3H4]", ("1-2", "L3H4")),
        ("['1-2' , \"a, b\"]", ("1-2", "a, b")),
        ("1-2", "1-2"),
        ("auto", "auto"),
    ):
        assert finder_options(f"heads={value}").heads == expected
    assert quote_free_text("heads=auto,greedy", sweeps=True) == "heads=auto,greedy"


@pytest.mark.parametrize("name", options_of_kind("path", "paths"))
def test_a_path_may_begin_with_the_home_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every path option; `~` elsewhere in a path is an ordinary character."""
    monkeypatch.setenv("HOME", "/home/ann")
    field = option_names("finder")[name]
    group = ["segmenter=sam"] if name == "segmenter.name" else []
    field_or_group = FinderOptions.__pydantic_fields__[name.partition(".")[0]]
    group += [f"stage={stage}" for stage in option_metadata(field_or_group).get("stages", [])[:1]]
    typed = {"~/a b/c.json": "/home/ann/a b/c.json", "x/~/y": "x/~/y", "https://a.example/~ann/x": None}
    for written, expected in typed.items():
        options: Any = finder_options(*group, f"{name}={written}")
        for key in name.split("."):
            options = getattr(options, key)
        value = options[0] if isinstance(options, tuple) else options
        assert value == (expected or written)
    if read_as(field) == "paths":
        assert getattr(finder_options(*group, f"{name}=[~/a,b]"), name) == ("/home/ann/a", "b")


def test_paths_in_the_home_folder_are_used(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the data, the heads and the results of the finder, and for the viewer."""
    monkeypatch.setenv("HOME", str(front.folder))
    write_data(front.folder, 2)
    for options in (["stage=find"], ["stage=ground", "heads=~/out/tiny/heads.json", "k=1"]):
        result = front.finder(*options, "data_file=~/data.jsonl", "output_dir=~/out", "report=false")
        assert result.status == 0, result.err
    assert not (front.folder / "~").exists()
    result = front.finder("stage=collect", "image_file=~/image_0.png", "query=x", "output_dir=~/out")
    assert result.status == 0, result.err
    file = next((front.folder / "out/tiny/attention").glob("image_0*.pkl"))
    result = front.visualize(f"attention_file=~/{file.relative_to(front.folder)}", "output_dir=~/figures")
    assert result.status == 0, result.err
    assert list((front.folder / "figures").iterdir())


# ------------------------------------------------------------------------------------ errors and statuses


WRONG_USE: dict[str, list[tuple[list[str], str]]] = {
    "finder": [
        (["stage=nap"], "stage=nap: choose one of batch, find,"),
        (["stag=batch"], "stag= is no option: did you mean stage=? --help lists all"),
        (["query=the", "cat"], "cat belongs to no option; a text with spaces needs quotes: 'query=the cat'"),
        (["query=the", "red", "cat", "k=1"], "needs quotes: 'query=the red cat'"),
        (["image_file=my", "-old", "cat.png"], "needs quotes: 'image_file=my -old cat.png'"),
        (["find"], "find: write NAME=VALUE; --help lists all"),
        (["stge"], "stge: write NAME=VALUE; did you mean stage? "),
        (["k=1", "stage"], "stage has no value: write stage=VALUE"),
        (["--nonsense"], "--nonsense: write NAME=VALUE"),
        (["k=1", "--cfg"], "--cfg/-c: expected one argument"),
        (["model=big"], "model=big: choose one of "),
        (["model=null"], "model=null: choose one of "),
        (["criteria=null"], "criteria=null: choose one of "),
        (["grounding=null"], "grounding=null: choose one of "),
        (["data=null"], "data=null: choose one of "),
        (["model=lava"], "model=lava: did you mean llava? choose one of aya-vision, "),
        (["model=someone/model"], "model=someone/model: write model.name= for a Hugging Face id or a folder"),
        (["criteria=publishd"], "did you mean published?"),
        (["grounding=papr"], "did you mean paper?"),
        (["segmenter=grabcat"], "did you mean grabcut?"),
        (["experiment=tab"], "did you mean tab"),
        (["rung=mask_bx"], "did you mean mask_box?"),
        (["data=example"], "did you mean examples?"),
        (["engine=rey"], "did you mean ray?"),
        (["stage=grond"], "stage=grond: did you mean ground? choose one of batch"),
        (["grounding.binarise=ostu"], "did you mean otsu?"),
        (["scenes.cuont=3"], "did you mean scenes.count=?"),
        (["engine.num_workers=2"], "engine.num_workers=2: only ray reads it, and not local"),
        (
            ["segmenter.num_points=5"],
            "segmenter.num_points=5: only sam or sam2 or sam3 reads it, and not grabcut",
        ),
        (["k=${x}"], "k=${x}: there is no option x"),
        (["criteria=own"], "criteria=own: choose one of paper, published"),
        (["model.nme=x"], "model.nme= is no option: did you mean model.name=?"),
        (["criteria.tua=1"], "did you mean criteria.tau=?"),
        (["+new=1"], "+new= is no option"),
        (["++k=1"], "++k= is no option: --help lists all"),
        (["~k"], "~k= is no option"),
        (["k=0"], "k=0: give a whole number of at least 1"),
        (["k=three"], "k=three: give a whole number"),
        (["k=1,2"], "k=1,2: give one value"),
        (["heads=1-2,3-4"], "heads=1-2,3-4: write auto, greedy"),
        (["top_k=0"], "top_k=0: "),
        (["heads=[1-2"], "heads=[1-2: write auto, greedy"),
        (["heads=null"], "heads=null: write auto, greedy, a heads.json"),
        (["k"], "k"),
        (["=5"], "= is no option: --help lists all"),
        (["stage=collect"], "image_file= is missing: stage=collect needs image_file and query"),
        (["stage=collect", "image_file=a.png"], "query= is missing"),
        (["stage=collect", "image_file=a.png", "query=   "], "query="),
        (["stage=analyze"], "attention_file= is missing"),
        (["stage=visualize"], "attention_file= is missing"),
        (["stage=batch", "data_file=no.jsonl"], "data_file=no.jsonl: no such file"),
        (["stage=batch", "data_file=null"], "data_file= is missing"),
        (["stage=ground", "image_file=no.png", "query=x"], "no.png: no such file"),
        (["stage=ground", "image_file=a=${x}, 'b'.png", "query={${y"], "a=${x}, 'b'.png: no such file"),
        (["stage=ground", "image_file=no/*.png", "query=x"], "no/*.png: no image file there"),
        (["stage=ground", "query=x"], "image_file= is missing"),
        (["stage=ground", "image_file=no.png"], "query= is missing"),
    ],
    "visualize": [
        ([], "attention_file= is missing"),
        (["attention_file=no.pkl"], "attention_file=no.pkl: there is no such file"),
        (["mode=single_"], "mode=single_: did you mean single? choose one of single, batch"),
        (["mode=batch", "data_file=no.jsonl"], "data_file=no.jsonl: no such file"),
        (["mode=batch", "data_file=null"], "data_file= is missing"),
        (["layr=5"], "did you mean layer=?"),
    ],
    "chat": [
        ([], "query= is missing"),
        (["query=Hi", "image_file=no.png"], "no.png: no such file"),
        (["query=Hi", "max_new_tokens=0"], "max_new_tokens=0: "),
        (["cli_mode=maybe"], "cli_mode=maybe: give true or false"),
    ],
}


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [(command, *case) for command, cases in WRONG_USE.items() for case in cases],
)
def test_wrong_use_is_one_line_and_status_2(front: Front, command: str, arguments: list[str], message: str) -> None:
    """The error names the option and how to fix it, and nothing is written."""
    result = getattr(front, command)(*arguments)
    assert result.status == 2, result.err
    assert message in one_line(result.err)
    assert not result.out
    assert list(front.folder.iterdir()) == []


ODD = [
    "-1", "[1,2]", "[[1]]", "{a:1}", "null", "", "x" * 300, "../../etc/passwd", "${x}", "${stage}", "é", "a,b", "a=b",
    "1e999", "nan", "???", "[", "{", "'", "choice(a,b)", "range(1,3)", "glob(*)", "true", "int(3)", "*", "a b", "\\",
    "\x01", "\ud800", "paper.yaml", "1_000", "[" * 500 + "]" * 500, "9" * 400, "9" * 5000,
]  # fmt: skip
GROUPS = ("model", "criteria", "grounding", "segmenter", "data", "experiment", "rung", "engine")
ODD_NAMES = [*GROUPS, "hydra.run.nonsense", "hydra/launcher", "model@x", "a b", "é", "model.", ".k", "k.x"]


def test_odd_names_and_values_give_one_line(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    """The options are composed and checked, without a model. (test_options.py tests every rule.)"""
    cases = [(name, ODD[7 * number % len(ODD)]) for number, name in enumerate(option_names("finder"))][::3]
    cases += [(name, odd) for name in ODD_NAMES for odd in ODD[:: 1 if name == "data" else 8]]
    helps = {program: help_text(program, "") for program in ("finder", "visualize", "chat", "demo")}
    for name, odd in cases:
        program = next((program for program, text in helps.items() if f"\n{name}:" in text), "finder")
        status = run(lambda _: 0, program, "program", [f"{name}={odd}"])
        err = capsys.readouterr().err
        assert status in (0, 2), (name, odd, err)
        if status:
            assert len(one_line(err)) < 1500, (name, odd)
            assert "Traceback" not in err and "object_type" not in err, err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UsageError("k=0: no"), 2, "error: k=0: no\n"),
        (WorkError("no memory"), 1, "error: no memory\n"),
        (ValueError("two\nlines"), 1, "error: ValueError: two lines (debug=true shows where)\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; what was finished is kept"),
    ],
)
@pytest.mark.parametrize("debug", [None, "option", "environment"])
def test_statuses_and_tracebacks(
    front: Front,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
    debug: str | None,
) -> None:
    """A traceback is shown only on request, and the request does not affect the next run."""

    def fail(_: CommandLine) -> int:
        raise error

    if debug == "environment":
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    else:
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    arguments = ["debug=true"] if debug == "option" else []
    for _ in range(2):
        assert run(fail, "finder", "program", arguments) == status
        err = capsys.readouterr().err
        assert message in err
        assert ("Traceback" in err) == (debug is not None)
    assert os.environ.get("HYDRA_FULL_ERROR") == ("1" if debug == "environment" else None)


def test_the_status_of_a_command_is_that_of_main(front: Front) -> None:
    assert [run(lambda _, status=status: status, "finder", "program", []) for status in (0, 1)] == [0, 1]


def test_hydra_neither_creates_nor_changes_a_folder(front: Front) -> None:
    folders: list[str] = []
    run(lambda _: folders.append(os.getcwd()) or 0, "finder", "program", ["k=2"])  # noqa: PTH109
    assert folders == [str(front.folder)]
    assert list(front.folder.iterdir()) == []


def test_a_python_that_is_not_set_up_is_one_line(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command after `make run` in a shell that has not activated `.venv`."""
    monkeypatch.setitem(sys.modules, "hydra", None)
    result = front.finder("stage=doctor")
    assert result.status == 2
    assert "source .venv/bin/activate" in result.err and sys.executable in result.err
    assert result.err.count("\n") == 1


def test_a_real_process(tmp_path: Path) -> None:
    """An error of the script is one line on standard error, with its status."""
    result = run_python(str(ROOT / "localization_heads_finder.py"), "stage=collect", "query=x")
    assert (result.returncode, result.stdout) == (2, "")
    assert one_line(result.stderr).startswith("error: image_file= is missing")


def test_help_shows_the_defaults_of_the_groups() -> None:
    text = help_text("finder", "x")
    for line in ("model.name: embedded", "criteria.entropy: area", "grounding.sigma: 0.5", "data: examples"):
        assert f"\n{line}\n" in text


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = """
import sys
from localization_heads.apps import terminal, finder_stages
from localization_heads.stages import visualize
print("matplotlib" in sys.modules)
"""
    assert run_python("-c", code).stdout == "False\n"


# ------------------------------------------------------------------------------------------------- -q and -v


def test_quiet_prints_only_errors(front: Front) -> None:
    write_data(front.folder, 2)
    result = front.finder("-q", "stage=find", "data_file=data.jsonl")
    assert (result.status, result.out, result.err) == (0, "", "")
    assert (front.out / "heads.json").is_file()
    wrong = front.finder("-q", "stage=find", "data_file=none.jsonl")
    assert wrong.status == 2
    assert "none.jsonl" in one_line(wrong.err)


def test_verbose_notes_what_was_loaded_and_how_long_it_took(front: Front) -> None:
    write_data(front.folder, 2)
    notes = front.finder("stage=find", "data_file=data.jsonl", "--verbose").err
    assert "note: LVLM(embedded" in notes
    assert "note: stage=find took" in notes
    assert "note: stage" not in front.finder("stage=find", "data_file=data.jsonl").err


def test_progress_bars_are_restored_after_a_quiet_run(front: Front) -> None:
    from tqdm import tqdm

    front.finder("-q", "stage=find", "data_file=none.jsonl")
    with Path(os.devnull).open("w") as nowhere:
        assert not tqdm(total=1, file=nowhere, disable=False).disable


# ------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    ("outcome", "status", "message"),
    [
        (0, 0, ""),
        (1, 1, "a job of the sweep ended with status 1"),
        (UsageError("query= is missing"), 2, "query= is missing"),
        (WorkError("no memory"), 1, "no memory"),
    ],
)
def test_the_error_of_a_job_in_another_process_is_reported(
    outcome: Any,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Launchers for clusters run jobs elsewhere, and only exceptions come back."""
    processes = iter([("login", 1)])
    monkeypatch.setattr(frontdoor, "_process_id", lambda: next(processes, ("node", 2)))

    def main(_: CommandLine) -> int:
        if isinstance(outcome, Exception):
            raise outcome
        return int(outcome)

    assert run(main, "finder", "program", []) == status
    assert message in capsys.readouterr().err


def test_the_error_of_submitit_is_one_line() -> None:
    """It is the last exception of the traceback in submitit's message."""
    trace = (
        "Job (task=0) failed during processing with trace:\n----------------------\n"
        'Traceback (most recent call last):\n  File "a.py", line 3, in run\n    x: int = 1 / 0\n'
        "ZeroDivisionError: division by zero\nDuring handling of it, another:\n"
        "{0}: {1}\n\n----------------------\nYou can check full logs with 'job.stderr(0)': or there\n"
    )
    ours = RuntimeError(trace.format("localization_heads.errors.WorkError", "out of memory: lower batch_size"))
    assert frontdoor._job_error(ours) == "out of memory: lower batch_size"
    theirs = RuntimeError(trace.format("RuntimeError", "no space"))
    assert frontdoor._job_error(theirs) == "a job of the sweep failed: RuntimeError: no space"
    assert "timed out" in frontdoor._job_error(RuntimeError("timed out"))

"""The commands `visualize_attention.py` and `cli_llava.py`, end to end."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from front import Front, Result, draw_image, one_line, stub_figures, write_lines
from PIL import Image
from transformers.generation import GenerationMixin

from localization_heads.apps import terminal
from localization_heads.attention import AttentionMaps
from localization_heads.lvlm import conversation as answers
from localization_heads.lvlm.model import LVLM
from localization_heads.store.attention_files import load_attention, save_attention

ROOT = Path(__file__).parents[1]
LAYERS, HEADS = 5, 4


@pytest.fixture
def front(front: Front) -> Front:
    """An image and two attention files of an unnamed model."""
    draw_image(front.folder / "cat.png")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        maps = AttentionMaps(
            attention=rng.dirichlet(np.full(36, 0.2), (LAYERS, HEADS)).astype("f4").reshape(LAYERS, HEADS, 6, 6),
            image_box=(0.0, -8.0, 64.0, 56.0),
            image_size=(64, 48),
            image_file="cat.png",
            query="the dog",
            id=name,
        )
        save_attention(maps, front.folder / f"{name}.pkl")
    return front


@pytest.fixture
def stubbed(front: Front, monkeypatch: pytest.MonkeyPatch) -> Front:
    """The commands with empty files in place of figures."""
    stub_figures(monkeypatch)
    return front


# ---------------------------------------------------------------------------------------- visualize_attention


def figures_in(folder: str | Path = ".") -> set[str]:
    return {path.name for path in Path(folder).glob("*.png")} - {"cat.png"}


def visualize_batch(front: Front, entries: Sequence[dict[str, Any] | str], *options: str) -> Result:
    write_lines(Path("data.jsonl"), entries)
    return front.visualize("mode=batch", "data_file=data.jsonl", *options)


def failures_in(out: str) -> str:
    """The table of failed entries, without line breaks."""
    return " ".join(out[out.index("Entries that failed") :].split())


def test_single_draws_the_top_heads(front: Front) -> None:
    """Real figures, next to the attention file."""
    result = front.visualize("mode=single", "attention_file=a.pkl", "show_components=true", "top_k=2")
    assert result.status == 0, result.err
    names = figures_in()
    assert "a_visualization.png" in names
    assert sum(name.startswith("a_components_L") for name in names) == 2
    assert sorted(f"wrote {name}" for name in names) == sorted(result.out.split("\n")[:-1])
    for name in names:
        assert np.asarray(Image.open(name).convert("L")).std() > 1, "an empty figure"


def test_single_draws_a_named_head_or_the_top_heads_with_their_box(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`top_k` heads are drawn, and the box is that of the best `k`."""
    from localization_heads import figures

    drawn: list[tuple[list[Any], Any]] = []

    def spy(image: Any, maps: Any, heads: Any, path: Any, *, grounding: Any, statistics: Any) -> None:
        drawn.append((list(heads), grounding))

    monkeypatch.setattr(figures, "plot_top_maps", spy)
    assert front.visualize("attention_file=a.pkl", "layer=3", "head=1").status == 0
    assert front.visualize("attention_file=a.pkl", "top_k=5", "k=2").status == 0
    assert drawn[0] == ([(3, 1)], None)
    heads, grounding = drawn[1]
    assert len(heads) == 5
    assert grounding.heads == tuple(heads[:2])


@pytest.mark.parametrize(
    ("options", "folder", "names"),
    [
        (
            ["layer=3", "head=1", "show_components=true"],
            ".",
            {"a_visualization_L3H1.png", "a_components_L3H1.png"},
        ),
        (["output_dir=figures/new"], "figures/new", {"a_visualization.png"}),
        (["save_fig=false"], ".", set()),
    ],
)
def test_where_single_saves_figures(stubbed: Front, options: list[str], folder: str, names: set[str]) -> None:
    result = stubbed.visualize("attention_file=a.pkl", *options)
    assert result.status == 0, result.err
    assert figures_in(folder) == names
    assert len(result.out.splitlines()) == len(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["layer=3"], "layer= and head= go together"),
        (["head=3"], "layer= and head= go together"),
        (
            [f"layer={LAYERS}", "head=0"],
            f"layer={LAYERS} head=0: there is no L{LAYERS}H0; the layers are 0 to 4",
        ),
        (["layer=0", f"head={HEADS}"], "and the heads 0 to 3"),
        (["layer=-1", "head=0"], "layer=-1: give a whole number"),
        (["criteria.exclude_layers=5"], "criteria.exclude_layers=5: there are only 5 layers"),
        (["attention_file=cat.png"], "cat.png"),
        (["output_dir=cat.png"], "choose another output_dir"),
    ],
)
def test_wrong_use_of_single(front: Front, options: list[str], message: str) -> None:
    file = [] if "attention_file=cat.png" in options else ["attention_file=a.pkl"]
    result = front.visualize(*file, *options)
    assert result.status == 2, result.err
    assert message in one_line(result.err)
    assert figures_in() == set()


def test_batch_draws_every_entry(stubbed: Front) -> None:
    """A bad entry is reported with its line, and the others are drawn."""
    entries: list[Any] = [
        {"id": "first", "attention_file": "a.pkl"}, {"attention_file": "b.pkl", "layer": 2, "head": 3}, "{",
        {"attention_file": "no.pkl"}, {"attention_file": "a.pkl", "layer": 99, "head": 0},
        {"attention_file": "a.pkl", "layer": 1}, {"attention_file": "cat.png"}, {"id": "no_file"},
    ]  # fmt: skip
    result = visualize_batch(stubbed, entries, "show_components=true", "top_k=1")
    assert result.status == 1
    assert {"first_visualization.png", "b_visualization_L2H3.png", "b_components_L2H3.png"} <= figures_in()
    report = result.out[result.out.index("Entries that failed") :]
    lines = [int(row.split()[1]) for row in report.splitlines() if row[:1] == "│" and row.split()[1].isdecimal()]
    assert lines == [3, 4, 5, 6, 7, 8]
    assert visualize_batch(stubbed, entries, "process_all=false", "end_index=2").status == 0


def test_batch_of_the_finders_files(stubbed: Front) -> None:
    """Paths may be relative to the data file's folder."""
    Path("sub").mkdir()
    Path("a.pkl").rename("sub/a.pkl")
    write_lines(Path("sub/data.jsonl"), [{"attention_file": "a.pkl"}])
    assert stubbed.visualize("mode=batch", "data_file=sub/data.jsonl").status == 0
    assert figures_in("sub") == {"a_visualization.png"}


def test_no_figure_of_a_batch_is_overwritten(stubbed: Front) -> None:
    """Every entry has its own file, named after its id and head; one that would overwrite another is refused."""
    Path("other").mkdir()
    Path("other/a.pkl").write_bytes(Path("b.pkl").read_bytes())
    head = {"layer": 2, "head": 3}
    entries: list[dict[str, Any]] = [
        {"attention_file": "a.pkl"}, {"attention_file": "a.pkl", **head},
        {"attention_file": "a.pkl", "layer": 2, "head": 1}, {"id": "mine", "attention_file": "a.pkl"},
        {"id": "mine", "attention_file": "a.pkl", **head}, {"attention_file": "other/a.pkl"},
        {"attention_file": "a.pkl", **head},
    ]  # fmt: skip
    result = visualize_batch(stubbed, entries, "output_dir=drawn")
    assert result.status == 1
    assert figures_in("drawn") == {
        "a_visualization.png", "a_visualization_L2H3.png", "a_visualization_L2H1.png",
        "mine_visualization.png", "mine_visualization_L2H3.png",
    }  # fmt: skip
    assert result.out.count("wrote ") == 5
    assert "its figures would write over those of line 1" in result.out
    assert "its figure is that of line 2 already" in result.out
    visualize_batch(stubbed, entries)  # without output_dir, each in the folder of its attention file
    assert figures_in("other") == {"a_visualization.png"}


def test_a_batch_finds_files_by_id_and_under_other_models(stubbed: Front) -> None:
    """By id alone, or by a path under another model, as with `attention_file=`. Several candidates are an error."""
    outputs = Path("outputs/localization_heads")
    for model, name in (("tiny", "x"), ("tiny", "y"), ("other", "y")):
        (outputs / model / "attention").mkdir(parents=True, exist_ok=True)
        (outputs / model / "attention" / f"{name}.pkl").write_bytes(Path("a.pkl").read_bytes())
    llava = outputs / "llava/attention"
    write_lines(
        Path("data.jsonl"),
        [
            {"id": "x"},
            {"id": "again", "attention_file": f"{llava}/x.pkl"},
            {"id": "y"},
            {"id": "y", "attention_file": f"{llava}/y.pkl"},
            {"id": "z"},
        ],
    )
    result = stubbed.visualize("mode=batch", "data_file=data.jsonl")
    assert result.status == 1
    assert figures_in(outputs / "tiny/attention") == {"x_visualization.png", "again_visualization.png"}
    report = failures_in(result.out)
    assert "there is no outputs/localization_heads/*/attention/z.pkl" in report
    result = stubbed.visualize(f"attention_file={llava}/y.pkl")
    assert result.status == 2
    choices = "name one of outputs/localization_heads/other/attention/y.pkl, outputs/localization_heads/tiny/"
    assert choices in one_line(result.err)
    assert report.count("name one of") == 2


def test_a_file_with_weights_above_1_fails_alone(front: Front) -> None:
    """Sums of 3e38 would overflow float32."""
    maps = pickle.loads(Path("a.pkl").read_bytes())
    Path("huge.pkl").write_bytes(pickle.dumps({**maps, "attention": np.full_like(maps["attention"], 3e38)}))
    result = visualize_batch(front, [{"attention_file": "huge.pkl"}, {"attention_file": "a.pkl"}])
    assert result.status == 1
    assert figures_in() == {"a_visualization.png"}
    assert "attention holds values above 1, which no softmax gives" in failures_in(result.out)


def test_the_examples_come_with_the_package(front: Front) -> None:
    """They are used where there is no data file, as in `locheads` outside the repository."""
    assert front.finder("end_index=1", "visualize_batch=false", "report=false").status == 0
    assert (front.out / "heads.json").is_file()
    result = front.finder("data_file=examples/no.jsonl")
    assert (result.status, one_line(result.err)) == (2, "error: data_file=examples/no.jsonl: no such file")


# ------------------------------------------------------------------------------------------------- cli_llava


@pytest.fixture
def talk(stubbed: Front, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a conversation with these lines on standard input."""

    def converse(lines: str, *options: str) -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return stubbed.chat("cli_mode=true", "max_new_tokens=3", *options)

    return converse


def test_a_single_question_prints_only_its_answer(front: Front) -> None:
    """On one line, the same every time; also without an image."""
    options = ("query=Describe this image", "image_file=cat.png", "max_new_tokens=5")
    result = front.chat(*options)
    assert (result.status, result.err) == (0, "")
    assert result.out.endswith("\n")
    assert front.chat(*options).out == result.out
    assert front.chat("query=Hello", "max_new_tokens=2").status == 0


def test_a_question_with_control_tokens_is_refused(front: Front) -> None:
    result = front.chat("query=a </s> b", "image_file=cat.png")
    assert result.status == 2
    assert "control token" in one_line(result.err)


def test_a_conversation(talk: Callable[..., Result]) -> None:
    """Answers, commands and errors, each of which is printed; it continues until `/exit`."""
    lines = [
        "/ground the dog", "/image", "/image no.png", "/image cat.png", "What is it?", "/ground", "/ground </s>",
        "/ground the dog, on the left", "/trace", "/trace what is it?", "/dance", "   ", "<image> and </s>", "/help",
        "/exit", "never said",
    ]  # fmt: skip
    result = talk("\n".join(lines) + "\n")
    assert result.status == 0
    assert "error" not in result.err
    expected = [
        "/help lists the commands", "error: there is no image yet: /image PATH", "error: write /image PATH",
        "error: no.png: no such file", "looking at cat.png, 64 x 48 pixels",
        "error: write /ground EXPRESSION", "error: the expression holds '</s>'", "box ",
        "wrote outputs/localization_heads/tiny/attention/cat_the-dog-on-the-left_grounding.png",
        "error: write /trace QUESTION",
        "wrote outputs/localization_heads/tiny/attention/cat_what-is-it_trace.html",
        "/dance is no command; /help lists them", "error: the expression holds '</s>'",
        "Ctrl-C stops an answer",
    ]  # fmt: skip
    position = 0
    for text in expected:
        assert text in result.out[position:], (text, result.out)
        position = result.out.index(text, position) + len(text)
    assert Path("outputs/localization_heads/tiny/attention/cat_the-dog-on-the-left_grounding.png").is_file()


def test_the_end_of_the_input_ends_the_conversation(talk: Callable[..., Result]) -> None:
    """The last line need not end with a newline."""
    result = talk("/ground the dog", "image_file=cat.png")
    assert result.status == 0
    assert "box " in result.out


@pytest.mark.parametrize("conv_mode", ["plain", "nonsense"])
def test_ground_uses_the_prompt_that_the_heads_were_found_with(
    talk: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, conv_mode: str
) -> None:
    """The conversation itself uses the model's chat template."""
    conv_modes: list[str] = []
    head = {"layer": 2, "head": 0, "selection_frequency": 1, "selection_frequency_std": 0}
    ranking = {
        "version": 1, "model": "x", "num_samples": 1, "num_trials": 1, "tau": 0.1, "top_n": 1, "exclude_layers": 2,
        "heads": [{**head, "attention_sum": 0.5, "spatial_entropy": None}], "found_with": {"conv_mode": conv_mode},
    }  # fmt: skip
    Path("mine.json").write_text(json.dumps(ranking))
    ground = terminal.ground
    monkeypatch.setattr(
        terminal, "ground", lambda lvlm, *a, **k: conv_modes.append(lvlm.conv_mode) or ground(lvlm, *a, **k)
    )
    assert talk("/ground the dog\n", "image_file=cat.png", "heads=mine.json", "k=1").status == 0
    assert conv_modes == ["plain" if conv_mode == "plain" else "referseg"]


def test_another_image_starts_a_new_conversation(talk: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """After `/image`, the prompt contains no earlier turns."""
    prompts: list[tuple[tuple[int, int] | None, str]] = []

    def answer(lvlm: LVLM, image: Any, prompt: str, count: int) -> Iterator[str]:
        prompts.append((image and image.size, prompt))
        yield "yes"

    monkeypatch.setattr(answers, "stream", answer)
    draw_image(Path("dog.png"), 1, (32, 32))
    monkeypatch.setenv("HOME", str(Path.cwd()))
    talk("One?\nTwo?\n/image ~/dog.png\nThree?\n", "image_file=cat.png")
    assert [size for size, _ in prompts] == [(64, 48), (64, 48), (32, 32)]
    assert "One?" in prompts[1][1]
    assert "yes" in prompts[1][1]
    assert "One?" not in prompts[2][1]


def test_ctrl_c_stops_an_answer_and_not_the_program(
    talk: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """During an answer, during `/ground`, and at the prompt."""

    def endless(lvlm: LVLM, image: Any, prompt: str, count: int) -> Iterator[str]:
        yield "well"
        raise KeyboardInterrupt

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "stream", endless)
    monkeypatch.setattr(terminal, "ground", interrupted)
    lines = iter(["What?\n", "/ground the dog\n", None, "/help\n"])

    class Keyboard:
        def isatty(self) -> bool:
            return False

        def readline(self) -> str:
            line = next(lines, "")
            if line is None:
                raise KeyboardInterrupt
            return line

    read = terminal.make_line_reader

    def keyboard() -> Callable[[], str]:
        monkeypatch.setattr(sys, "stdin", Keyboard())
        return read()

    monkeypatch.setattr(terminal, "make_line_reader", keyboard)
    result = talk("", "image_file=cat.png")
    assert result.status == 0
    for words in ("well [stopped]", "stopped\n", "/exit leaves", "Ctrl-D"):
        assert words in result.out


def test_a_real_ctrl_c_stops_the_model(
    front: Front, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal arrives while the model generates. Its thread ends, and the partial answer is kept."""
    from front import cached_load_model

    lvlm = cached_load_model("tiny", device="cpu", conv_mode="chat")
    settings = lvlm.model.generation_config
    # Only one word can be generated, since some other tokens are not printed, or not until the next blank.
    words = lvlm.processor.tokenizer.get_vocab()
    monkeypatch.setattr(settings, "suppress_tokens", [id for word, id in words.items() if word != "dog"])
    conversation = answers.Conversation(lvlm, Image.open("cat.png"), max_new_tokens=100_000)
    threads, seen = set(threading.enumerate()), []

    class Screen(io.StringIO):
        def flush(self) -> None:
            if not seen:
                seen.append(self.getvalue())
                os.kill(os.getpid(), signal.SIGINT)

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    terminal.print_answer(conversation, "What is it?")
    assert screen.getvalue().endswith(" [stopped]\n")
    assert set(threading.enumerate()) <= threads
    assert conversation.messages[-1]["content"][0]["text"].startswith(seen[0].strip())


@pytest.mark.parametrize(
    ("target", "error", "line", "message"),
    [
        ("generate", RuntimeError("no memory"), "What?", "error: the model could not answer: no memory"),
        ("ground", ZeroDivisionError("by\nzero"), "/ground the dog", "error: ZeroDivisionError: by zero\n"),
        (None, None, "/ground the dog", "error: heads: there is no L99H0"),
    ],
)
def test_no_failure_ends_the_conversation(
    talk: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    target: str | None,
    error: Exception | None,
    line: str,
    message: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        assert error
        raise error

    if target:
        monkeypatch.setattr(GenerationMixin if target == "generate" else terminal, target, fail)
    heads = "heads=auto" if target else "heads=[99-0]"
    result = talk(f"{line}\n/help\n", "image_file=cat.png", heads)
    assert result.status == 0
    assert message in result.out
    assert "/exit" in result.out


def test_control_sequences_are_not_printed(talk: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if they are generated in pieces. Line breaks of an answer are kept."""

    def answer(lvlm: LVLM, image: Any, prompt: str, count: int) -> Iterator[str]:
        yield from ("a\nb\u001b", "[2J", "c\u202e")

    monkeypatch.setattr(answers, "stream", answer)
    result = talk("What?\n/\u001b[2J\n")
    assert "a\nb\ufffd[2Jc\ufffd\n" in result.out
    assert "\u001b" not in result.out


def chat_process(folder: Path, *options: str | bytes, lines: bytes = b"") -> tuple[int, list[str], str]:
    """Run `cli_llava.py` in a process; returns its status, its output lines, and its standard error."""
    draw_image(folder / "cat.png")
    run = [sys.executable, str(ROOT / "cli_llava.py"), "image_file=cat.png", "max_new_tokens=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    command = list(map(os.fsencode, [*run, *options]))
    result = subprocess.run(command, input=lines, capture_output=True, cwd=folder, env=env, check=False)
    return result.returncode, result.stdout.decode().splitlines(), result.stderr.decode()


def test_undecodable_text_fails_its_line_only(tmp_path: Path) -> None:
    """Latin-1 bytes from a pipe (`printf ... | python cli_llava.py cli_mode=true`) and in an argument."""
    lines = b"un caf\xe9?\n/caf\xe9\nWhat is it?\n/nonsense\n/exit\n"
    status, out, err = chat_process(tmp_path, "cli_mode=true", lines=lines)
    assert status == 0 and "Traceback" not in err, err
    assert out[0] == "embedded: /help lists the commands"
    assert out[1].startswith("error: the expression is not valid Unicode text")
    assert out[2] == "/caf\ufffd is no command; /help lists them"
    assert out[4:] == ["/nonsense is no command; /help lists them"]
    status, _, err = chat_process(tmp_path, b"query=un caf\xe9?")
    assert status == 2
    assert "not valid Unicode" in one_line(err)


def test_the_viewer_draws_an_attention_file_of_the_finder(stubbed: Front) -> None:
    assert stubbed.finder("stage=collect", "image_file=cat.png", "query=the dog", "save_id=x").status == 0
    path = stubbed.out / "attention/x.pkl"
    last = load_attention(path).num_layers - 1
    result = stubbed.visualize(f"attention_file={path}", f"layer={last}", "head=0", "show_components=true")
    assert result.status == 0, result.err
    assert (stubbed.out / f"attention/x_components_L{last}H0.png").is_file()


def test_file_and_head_of_a_missing_model_are_replaced_with_a_note(stubbed: Front) -> None:
    """A head is replaced only together with the file."""
    folder = Path("outputs/localization_heads/tiny/attention")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x.pkl").write_bytes(Path("a.pkl").read_bytes())
    result = stubbed.visualize("attention_file=outputs/localization_heads/llava/attention/x.pkl", "layer=20", "head=50")
    assert result.status == 0, result.err
    assert f"has no L20H50: showing L{LAYERS - 1}H{HEADS - 1}" in " ".join(result.err.split())
    assert figures_in(folder) == {f"x_visualization_L{LAYERS - 1}H{HEADS - 1}.png"}
    assert stubbed.visualize(f"attention_file={folder}/x.pkl", "layer=20", "head=50").status == 2


# ------------------------------------------------------------------------------------------------- terminal


@contextmanager
def keyboard(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A terminal with its history in a folder; yields the input for keys, and a function that reads a line."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys, terminal.make_line_reader()


def read_typed(text: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """The line that these keys give in a new conversation."""
    with keyboard(monkeypatch, folder) as (keys, read):
        keys.send_text(text)
        return read()


def test_a_terminal_supports_editing_ctrl_c_and_ctrl_d(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with keyboard(monkeypatch, tmp_path) as (keys, read):
        keys.send_text("hello\nhex\x7fy\n")
        assert [read(), read()] == ["hello", "hey"]
        keys.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            read()
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            read()


def test_the_history_is_kept_between_conversations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If its folder is not writable, it is kept in memory."""
    assert read_typed("/ground the dog\r", monkeypatch, tmp_path) == "/ground the dog"
    up = "\x1b[A"
    assert read_typed(f"{up}\r", monkeypatch, tmp_path) == "/ground the dog"
    history = tmp_path / "localization-heads" / "history"
    assert history.is_file()
    assert read_typed("hello\r", monkeypatch, history) == "hello"


def test_commands_and_files_are_completed(tmp_path: Path) -> None:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    def completions(text: str) -> list[str]:
        return [c.text for c in terminal.completer().get_completions(Document(text), CompleteEvent())]

    assert completions("/gr") == ["/ground"]
    assert completions("/") == ["/image", "/ground", "/trace", "/help", "/exit"]
    (tmp_path / "image.png").touch()
    assert completions(f"/image {tmp_path}/ima") == ["ge.png"]
    assert completions("the dog") == []

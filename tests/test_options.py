"""Every option is explained, every preset composes, and every invalid value is named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from runpy import run_path
from typing import Any, Literal, get_args, get_origin

import pytest

from localization_heads.apps.finder_stages import STAGES as FINDER_STAGES
from localization_heads.apps.frontdoor import quote_free_text
from localization_heads.errors import UsageError
from localization_heads.experiments.paper import REASON_SPLITS, SPLITS
from localization_heads.lvlm.answers.box_formats import FORMATS
from localization_heads.options import experiments, groups, programs
from localization_heads.options.compose import PROGRAMS, choices_of, compose_options, help_text, option_names
from localization_heads.options.experiments import EXPERIMENTS
from localization_heads.options.groups import CriteriaOptions, GroundingOptions, SegmenterOptions
from localization_heads.options.programs import FinderOptions, VisualizeOptions
from localization_heads.stages.run import Run

ROOT = Path(__file__).parents[1]
GROUPS = {group: choices_of(group) for group in ("model", "criteria", "grounding", "data", "segmenter")}


def test_the_presets_have_the_documented_values() -> None:
    """As in the table of docs/reproducing-the-paper.md; `paper` is the default of every option."""
    criteria, grounding = (
        {choice: getattr(compose_options("finder", f"{group}={choice}"), group) for choice in GROUPS[group]}
        for group in ("criteria", "grounding")
    )
    assert criteria["paper"] == CriteriaOptions()
    assert grounding["paper"] == GroundingOptions()
    june = CriteriaOptions(
        "mass", 0.001, elbow="index", exclude_layers=0, elbow_heads="all", per_sample=True, ties="order",
        fallback="order",
    )  # fmt: skip
    assert criteria["published"] == june
    dropped = {"exclude_layers": 2, "bottom_row_filter": True, "bottom_row_above": 0.05}
    august = replace(june, elbow="value", means=2, fallback="sum", **dropped)
    assert criteria["published_august"] == august
    published = GroundingOptions(kernel_size=9, component="all", ignore_padding=True, border="repeat")
    assert grounding["published"] == published
    assert set(grounding) == {"paper", "published", "sharp"}  # no other box was ever published


@pytest.mark.parametrize(
    ("words", "preset"),
    [
        ("", "sharp"),
        ("criteria=published", "paper"),
        ("criteria=published_august", "paper"),
        ("stage=experiment", "paper"),
        ("stage=experiment experiment=tab1", "paper"),
        ("criteria=published grounding=sharp", "sharp"),
    ],
)
def test_the_default_read_out_follows_what_is_reproduced(words: str, preset: str) -> None:
    expected = compose_options("finder", f"grounding={preset}").grounding
    assert compose_options("finder", *words.split()).grounding == expected


def test_a_label_can_contain_the_swept_option() -> None:
    """As in docs/readouts.md: each run of a sweep gets its own folder."""
    label = "model.label='${grounding.binarise}'"
    assert quote_free_text(label) == label
    assert compose_options("finder", "grounding.binarise=otsu", label).model.label == "otsu"


@pytest.mark.parametrize("choice", choices_of("experiment"))
def test_every_experiment_composes(choice: str) -> None:
    names = compose_options("finder", "stage=experiment", f"experiment={choice}").experiment.names
    assert names == {"all": tuple(EXPERIMENTS), "none": ()}.get(choice, (choice,))


@pytest.mark.parametrize("choice", choices_of("rung"))
def test_every_rung_composes(choice: str) -> None:
    """Those with the published code's criteria also drop its lone spaces."""
    options = compose_options("finder", f"rung={choice}")
    assert options.rung.name == choice
    assert options.drop_lone_spaces == (choice in ("published", "padding", "hull"))


def test_the_choices_equal_those_of_other_modules() -> None:
    assert tuple(EXPERIMENTS) == experiments.EXPERIMENTS
    assert (*SPLITS, *REASON_SPLITS) == experiments.Benchmark.__args__
    assert set(groups.NativeBox.__args__) == set(FORMATS)
    assert set(programs.Stage.__args__) == set(FINDER_STAGES)


def test_the_ladder_sweeps_over_all_rungs_in_order() -> None:
    climbed = experiments.TABLES["experiment"]["ladder"]["hydra"]["sweeper"]["params"]["rung"].split(",")
    assert [compose_options("finder", f"rung={rung}").rung.step for rung in climbed] == list(range(1, 8))
    assert set(climbed) == set(choices_of("rung")) - {"none"}


MODELS = [(model, "paper", "paper", "examples", "grabcut") for model in GROUPS["model"]]
RECIPES = list(product(["tiny"], GROUPS["criteria"], GROUPS["grounding"], GROUPS["data"], ["grabcut"]))
RECIPES += [("tiny", "paper", "paper", "examples", segmenter) for segmenter in GROUPS["segmenter"]]


@pytest.mark.parametrize("choices", [*MODELS, *RECIPES], ids=" ".join)
def test_every_preset_composes(choices: tuple[str, ...]) -> None:
    overrides = [f"{group}={choice}" for group, choice in zip(GROUPS, choices, strict=True)]
    assert Run(compose_options("finder", *overrides), model_choice=choices[0]).spec.name


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_explains_every_option_once(program: str) -> None:
    """And the program composes without overrides."""
    assert compose_options(program)
    text = help_text(program)
    for name, field in option_names(program).items():
        description = field.description or ""
        assert description[:1].isupper() or description.split()[0].islower(), name
        assert len(re.findall(rf"^{re.escape(name)}: ", text, re.MULTILINE)) == 1, name
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.parametrize(
    "overrides", ["segmenter.num_points=5", "engine.num_workers=2", "segmenter=sam segmenter.iterations=3"]
)
def test_an_option_that_the_kind_ignores_is_an_error(overrides: str) -> None:
    with pytest.raises(UsageError, match=r"^(segmenter|engine)\.\w+=\d: only .* reads it, and not"):
        compose_options("finder", *overrides.split())
    assert compose_options("finder", "segmenter=sam", "segmenter.num_points=5").segmenter.num_points == 5


def test_an_unknown_option_of_a_class_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"SegmenterOptions.*colour"):
        SegmenterOptions(colour="red")  # type: ignore[call-arg]


def test_the_options_that_users_scripts_rely_on_exist() -> None:
    seed = (
        "stage image_file query attention_file top_k output_dir data_file batch_size visualize_batch show_plot "
        "save_id process_all start_index end_index max_new_tokens random_seed device conv_mode"
    )
    assert set(seed.split()) <= set(option_names("finder"))
    viewer = "mode attention_file layer head show_components top_k data_file output_dir save_fig show_plot"
    assert set(viewer.split()) <= set(option_names("visualize"))
    assert {"query", "image_file", "cli_mode"} <= set(option_names("chat"))


CLASSES = {"criteria": CriteriaOptions, "grounding": GroundingOptions, "segmenter": SegmenterOptions}
BY_TYPE: dict[Any, list[Any]] = {
    bool: ["yes", 1, None],
    int: ["3", 1.5, True, None],
    float: ["0.5", True, None, float("nan"), float("inf")],
    Literal: ["no-such-choice", True],
}
"""Values that no option of the type takes."""
INVALID: dict[str, list[Any]] = {
    "top_k": [0, -1, 101], "batch_size": [0, "8", 4097], "end_index": [-2], "random_seed": [-1, 2**32],
    "visualize_limit": [-1], "query": ["", "  ", ["a"], True], "image_file": [["a"], ""], "k": [0, 10_001],
    "top_n": [0, 10_001], "num_trials": [0, 1001], "output_dir": [None, "", ["a"]],
    "stage": [None], "query_token": [None], "phrases.by": [None],
    "criteria.threshold": [-1, "median", float("nan"), float("inf"), True, None],
    "criteria.tau": [-0.1, "x", "0.2", float("nan")], "criteria.exclude_layers": [-1], "criteria.means": [0, 0.9],
    "criteria.elbow_heads": [None], "criteria.ties": [None], "criteria.fallback": [None, False],
    "criteria.bottom_row_above": [-0.1, "x", "0.05", True],
    "grounding.kernel_size": [2, 0, -1, 65], "grounding.sigma": [-1], "grounding.upsample": [0, 17],
    "grounding.top_mass": [0, 1.01, -0.5], "grounding.means": [0, 0.5], "grounding.margin": [-0.001],
    "grounding.binarise": [None], "grounding.border": [None],
    "segmenter.prompt": [[], "box", ["box", "scribble"], ["box", "box"], [["box"]]],
    "segmenter.num_points": [0, 101], "segmenter.iterations": [0], "phrases.model": ["", None],
    "model.dtype": [None], "model.name": [None, ""], "model.label": ["", "../elsewhere", "a/b", ".."],
    "model.device_map": [""], "model.system": [5],
    "scenes.count": [0, 10**9], "scenes.height": [0, "all"],
    "experiment.names": ["fig3", ["fig4"], None], "experiment.ks": [[], [0], 3, ["x"]],
    "experiment.sigmas": [[-1], [float("inf")]], "experiment.kernels": [[2]], "experiment.taus": [[-0.1], 0.2],
    "experiment.min_frequency": [-0.1, 1.1], "experiment.random_sets": [1, 1001],
    "engine.num_workers": [0, "two"], "engine.cpus_per_worker": [0], "engine.gpus_per_worker": [-1],
    "engine.address": [""], "engine.object_store": [10],
}  # fmt: skip
"""Values outside the range of each option."""


def invalid_values() -> Iterator[tuple[str, Any]]:
    """Every option of the finder with each value that it must refuse."""
    for name, field in option_names("finder").items():
        kind = next((arg for arg in (field.annotation, *get_args(field.annotation)) if get_origin(arg)), None)
        kind = Literal if kind and get_origin(kind) is Literal else field.annotation
        for value in (*BY_TYPE.get(kind, ()), *INVALID.get(name, ())):
            yield name, value


@pytest.mark.parametrize(("name", "value"), list(invalid_values()))
def test_invalid_values_are_named(name: str, value: Any) -> None:
    """On the command line and, for a group, from Python."""
    group, _, key = name.rpartition(".")
    with pytest.raises(UsageError, match=rf"^{re.escape(name)}=.*: ") as caught:
        FinderOptions.of(nested(name, value))
    assert "\n" not in str(caught.value)
    if group in CLASSES:
        for make in (CLASSES[group], partial(replace, CLASSES[group]())):
            with pytest.raises(ValueError, match=f"^{key}=") as raised:
                make(**{key: value})
            assert isinstance(raised.value, UsageError) and "\n" not in str(raised.value)


def nested(name: str, value: Any) -> dict[str, Any]:
    group, _, key = name.rpartition(".")
    return {group: {key: value}} if group else {key: value}


@pytest.mark.parametrize("name", option_names("finder"))
def test_any_value_passes_or_is_refused_in_one_line(name: str) -> None:
    """Whatever Hydra's grammar or a script passes."""
    odd: list[Any] = [
        None, True, -1, 10**400, 0.5, float("nan"), float("inf"), "", " ", "x" * 300, "é", "\ud800", "\0", "a\nb", "[",
        [], [1, 2], [[1]], [None], [{}], [["a"], "b"], {}, {"a": 1}, (1,), "~", "~nobody-here/x",
    ]  # fmt: skip
    for value in odd:
        message = ""
        try:
            FinderOptions.of(nested(name, value))
        except UsageError as error:
            message = str(error)
        assert "\n" not in message and len(message) < 700, value


@pytest.mark.parametrize(
    "options",
    [
        {"query": 5, "stage": "ground"},
        {"visualize_limit": None},
        {"criteria": {"threshold": 0.001, "tau": 0}},
        {"model": {"system": "", "label": None, "quantization": "4bit"}},
        {"end_index": -1},
        {"start_index": 5, "end_index": -1},
        {"start_index": 5, "end_index": 6},
        {"batch_size": 4096, "num_trials": 1000, "k": 10_000, "grounding": {"kernel_size": 63}},
        {"scenes": {"size": 256, "height": 256}},
        *({"stage": stage, name: None} for name, stage in (("query", "find"), ("dataset", "batch"))),
    ],
)
def test_valid_values_pass(options: Mapping[str, Any]) -> None:
    FinderOptions.of(options)
    assert VisualizeOptions.of({"mode": "single", "output_dir": None}).output_dir is None


UNREAD = {
    "image_file": ("batch", "stage=collect or pipeline or ground or doctor"),
    "query": ("find", "stage=collect or pipeline"),
    "save_id": ("evaluate", "stage=collect or pipeline"),
    "attention_file": ("batch", "stage=analyze or visualize"),
    "dataset": ("batch", "stage=prepare"),
}
MASK = {"grounding": {"box_from": "mask"}}
NEEDS_MASK = "grounding.box_from=mask needs a segmenter, .*"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("finder", {"scenes": {"size": 256, "height": 300}}, r"^scenes\.height=300: .*256 rows"),
    ("finder", {**MASK, "segmenter": {"kind": "none"}}, NEEDS_MASK + "segmenter=grabcut"),
    ("visualize", MASK, NEEDS_MASK + "stage=visualize"),
    *(
        ("finder", {"start_index": i, "end_index": j}, f"start_index={i} end_index={j}: the range is empty")
        for i, j in ((5, 3), (3, 3), (0, 0))
    ),
    *(
        (
            "finder",
            {"stage": stage, name: "refcoco"},
            f"^{name}=: stage={stage} does not read it; write {fix}",
        )
        for name, (stage, fix) in UNREAD.items()
    ),
    *(
        ("finder", {"stage": "find", **values}, f"^{name}=: stage=find does not read it; write stage={fix}")
        for name, values, fix in (
            ("ablate.steer", {"ablate": {"steer": True}}, "ablate"),
            ("trace.keep", {"trace": {"keep": "all"}}, "trace"),
            ("doctor.check", {"doctor": {"check": True}}, "doctor"),
            ("phrases.by", {"phrases": {"by": "whole"}}, "ground"),
            ("experiment", {"experiment": {"names": ["tab1"]}}, "experiment"),
            ("native", {"native": True}, "evaluate or ablate or experiment"),
            ("bootstrap", {"bootstrap": "image"}, "evaluate or experiment"),
            ("exclude", {"exclude": ["a.jsonl"]}, "prepare"),
        )
    ),
]


@pytest.mark.parametrize(("program", "options", "message"), REFUSED)
def test_conflicting_options_are_refused(program: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PROGRAMS[program].of(options)


def test_any_stage_takes_the_original_options() -> None:
    """Existing scripts set them once for all stages."""
    options = FinderOptions.of({"stage": "find", "max_new_tokens": 4, "attention_format": "safetensors"})
    assert options.max_new_tokens == 4


def test_a_missing_option_is_named_with_its_stage() -> None:
    with pytest.raises(UsageError, match="query= is missing: stage=collect needs image_file and query"):
        FinderOptions.of({"stage": "collect", "image_file": "a.png"}).require("image_file", "query")


def test_the_page_of_options_is_up_to_date() -> None:
    """Generated by `python docs/build_options.py`."""
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert run_path(str(ROOT / "docs" / "build_options.py"))["markdown"]() in page

"""Every option is explained once, every preset composes, and every wrong value is named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from runpy import run_path
from typing import Any

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


def test_the_shipped_choices() -> None:
    assert {"tiny", "llava", "llava-13b"} <= set(GROUPS["model"])
    assert {"paper", "published"} <= set(GROUPS["criteria"]) & set(GROUPS["grounding"])
    assert {"examples", "scenes"} <= set(GROUPS["data"])


def test_the_presets_are_the_readings_that_they_name() -> None:
    """Each as the table of docs/reproducing-the-paper.md has it; `paper` is what the code does without options."""
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
    of_all_cells = GroundingOptions(kernel_size=9, component="all", ignore_padding=True, border="repeat")
    assert grounding["published"] == of_all_cells
    assert set(grounding) == {"paper", "published", "sharp"}  # no other box was ever published
    assert compose_options("finder").grounding == grounding["sharp"]  # what newcomers get
    for words in (
        ["criteria=published"],
        ["criteria=published_august"],
        ["stage=experiment", "experiment=tab1"],
        ["stage=experiment"],
    ):
        assert compose_options("finder", *words).grounding == grounding["paper"]
    assert compose_options("finder", "criteria=published", "grounding=sharp").grounding == grounding["sharp"]
    dropping = {
        rung: compose_options("finder", f"rung={rung}").drop_lone_spaces for rung in choices_of("rung")
    }
    assert {rung for rung, drops in dropping.items() if drops} == {"published", "padding", "hull"}


def test_a_label_can_name_what_is_swept() -> None:
    """As docs/readouts.md has it: each evaluation of a sweep gets a folder of its own."""
    label = "model.label='${grounding.binarise}'"
    assert quote_free_text(label) == label
    assert compose_options("finder", "grounding.binarise=otsu", label).model.label == "otsu"


@pytest.mark.parametrize("choice", choices_of("experiment"))
def test_every_experiment_composes(choice: str) -> None:
    names = compose_options("finder", "stage=experiment", f"experiment={choice}").experiment.names
    assert names == {"all": tuple(EXPERIMENTS), "none": ()}.get(choice, (choice,))


@pytest.mark.parametrize("choice", choices_of("rung"))
def test_every_rung_composes(choice: str) -> None:
    assert compose_options("finder", f"rung={choice}").rung.name == choice


def test_the_tables_are_those_of_the_catalogue() -> None:
    assert tuple(EXPERIMENTS) == experiments.EXPERIMENTS
    assert (*SPLITS, *REASON_SPLITS) == experiments.Benchmark.__args__
    assert set(groups.NativeBox.__args__) == set(FORMATS)
    assert set(programs.Stage.__args__) == set(FINDER_STAGES)


def test_the_rungs_of_the_ladder_are_in_order() -> None:
    """What the multirun climbs is every rung there is, by its number."""
    climbed = experiments.TABLES["experiment"]["ladder"]["hydra"]["sweeper"]["params"]["rung"].split(",")
    assert [compose_options("finder", f"rung={rung}").rung.step for rung in climbed] == list(range(1, 8))
    assert set(climbed) == set(choices_of("rung")) - {"none"}


MODELS = [(model, "paper", "paper", "examples", "grabcut") for model in GROUPS["model"]]
RECIPES = list(product(["tiny"], GROUPS["criteria"], GROUPS["grounding"], GROUPS["data"], ["grabcut"]))
RECIPES += [("tiny", "paper", "paper", "examples", segmenter) for segmenter in GROUPS["segmenter"]]


@pytest.mark.parametrize("choices", [*MODELS, *RECIPES], ids=" ".join)
def test_every_choice_composes(choices: tuple[str, ...]) -> None:
    overrides = [f"{group}={choice}" for group, choice in zip(GROUPS, choices, strict=True)]
    assert Run(compose_options("finder", *overrides), model_choice=choices[0]).spec.name


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_is_explained_where_it_is_declared(program: str) -> None:
    """And composes to its default."""
    assert compose_options(program)
    shown = help_text(program)
    for name, field in option_names(program).items():
        assert (field.description and field.description[0].isupper()) or field.description.split()[
            0
        ].islower(), name
        assert len(re.findall(rf"^{re.escape(name)}: ", shown, re.MULTILINE)) == 1, name
    assert max(map(len, shown.splitlines())) <= 130


def test_what_a_kind_does_not_read_is_said() -> None:
    for overrides in (
        ["segmenter.num_points=5"],
        ["engine.num_workers=2"],
        ["segmenter=sam", "segmenter.iterations=3"],
    ):
        with pytest.raises(UsageError, match=r"^(segmenter|engine)\.\w+=\d: only .* reads it, and not"):
            compose_options("finder", *overrides)
    assert compose_options("finder", "segmenter=sam", "segmenter.num_points=5").segmenter.num_points == 5


def test_from_python_a_wrong_value_is_one_line() -> None:
    for make in (lambda: CriteriaOptions(tau=-1), lambda: replace(GroundingOptions(), kernel_size=2)):
        with pytest.raises(ValueError, match=r"^(tau|kernel_size)=-?\d: give .*number") as caught:
            make()
        assert isinstance(caught.value, UsageError) and "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"SegmenterOptions.*colour"):
        SegmenterOptions(colour="red")  # type: ignore[call-arg]


def test_the_options_of_the_seed_are_there() -> None:
    """Names that users' scripts hold."""
    seed = (
        "stage image_file query attention_file top_k output_dir data_file batch_size visualize_batch show_plot "
        "save_id process_all start_index end_index max_new_tokens random_seed device conv_mode"
    )
    assert set(seed.split()) <= set(option_names("finder"))
    viewer = "mode attention_file layer head show_components top_k data_file output_dir save_fig show_plot"
    assert set(viewer.split()) <= set(option_names("visualize"))
    assert {"query", "image_file", "cli_mode"} <= set(option_names("chat"))


CLASSES = {"criteria": CriteriaOptions, "grounding": GroundingOptions, "segmenter": SegmenterOptions}
WRONG = {
    "stage": ["nap", None, 5],
    "top_k": [0, -1, 1.5, "three", None, True, 101],
    "batch_size": [0, "8", 4097],
    "process_all": ["yes", 1, None],
    "end_index": [-2],
    "random_seed": [-1, 2**32],
    "attention_format": ["npz"],
    "conv_mode": ["vicuna"],
    "query_token": ["first"],
    "model.conv_mode": ["shout"],
    "visualize_limit": [-1],
    "query": ["", "  ", ["a"], True],
    "image_file": [["a"], ""],
    "k": [0, 10_001],
    "top_n": [0, 10_001],
    "num_trials": [0, 1001],
    "output_dir": [None, "", ["a"]],
    "criteria.threshold": [-1, "median", float("nan"), float("inf"), True, None],
    "criteria.tau": [-0.1, "x", "0.2", float("nan")],
    "criteria.entropy": ["volume"],
    "criteria.elbow": ["slope"],
    "criteria.exclude_layers": [-1, True, 1.5],
    "criteria.bottom_row_filter": [1],
    "criteria.means": [0, 0.9, None, True, "two", float("nan")],
    "drop_lone_spaces": ["some", None, 1],
    "criteria.elbow_heads": ["most", None, 2],
    "criteria.per_sample": ["sometimes", None, 1],
    "criteria.ties": ["layer", None, True],
    "criteria.fallback": ["five", None, False],
    "criteria.bottom_row_above": [-0.1, "x", "0.05", True],
    "grounding.kernel_size": [2, 0, -1, 1.0, 65, True],
    "grounding.sigma": [-1, float("inf"), float("nan")],
    "grounding.upsample": [0, 17, 1.5, True],
    "grounding.component": ["biggest"],
    "grounding.interpolation": ["cubic"],
    "grounding.binarise": ["median", None],
    "grounding.top_mass": [0, 1.01, -0.5, True, "half", float("nan")],
    "grounding.box_from": ["air"],
    "grounding.means": [0, 0.5, None, True, float("inf"), float("nan")],
    "grounding.margin": [-0.001, None, "x"],
    "grounding.border": ["reflect", None],
    "segmenter.kind": ["magic"],
    "segmenter.prompt": [[], "box", ["box", "scribble"], ["box", "box"], [["box"]]],
    "segmenter.num_points": [0, 101, True],
    "segmenter.iterations": [0, 1.5],
    "segmenter.multimask": ["yes"],
    "phrases.by": ["magic"],
    "phrases.model": ["", None],
    "model.dtype": ["int8", None],
    "model.quantization": ["2bit"],
    "model.name": [None, ""],
    "model.label": ["", "../elsewhere", "a/b", ".."],
    "model.attn_implementation": ["fast"],
    "model.device_map": [""],
    "model.system": [5],
    "scenes.count": [0, 10**9],
    "scenes.split": ["all"],
    "scenes.height": [0, "all"],
    "experiment.names": ["fig3", ["fig4"], None],
    "experiment.ks": [[], [0], 3, ["x"]],
    "experiment.sigmas": [[-1], [float("inf")]],
    "experiment.kernels": [[2]],
    "experiment.taus": [[-0.1], 0.2],
    "experiment.min_frequency": [-0.1, 1.1],
    "experiment.random_sets": [1, 1001],
    "experiment.benchmark": ["refcoco"],
    "grounding.ignore_padding": ["yes", None],
    "engine.kind": ["spark"],
    "engine.num_workers": [0, "two"],
    "engine.cpus_per_worker": [0, None],
    "engine.gpus_per_worker": [-1],
    "engine.address": [""],
    "engine.object_store": [10],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in WRONG.items() for value in bad])
def test_wrong_values_are_named(name: str, value: Any) -> None:
    """Of a command, and of the class that a script makes."""
    group, _, key = name.rpartition(".")
    with pytest.raises(UsageError, match=rf"^{re.escape(name)}=.*: ") as caught:
        FinderOptions.of(nested(name, value))
    assert "\n" not in str(caught.value)
    if group in CLASSES:
        with pytest.raises(ValueError, match=f"^{key}="):
            CLASSES[group](**{key: value})


def nested(name: str, value: Any) -> dict[str, Any]:
    group, _, key = name.rpartition(".")
    return {group: {key: value}} if group else {key: value}


@pytest.mark.parametrize("name", option_names("finder"))
def test_no_value_upsets_an_option(name: str) -> None:
    """It passes or is refused in one line, whatever Hydra's grammar or a program makes of it."""
    odd: list[Any] = [
        None, True, -1, 10**400, 0.5, float("nan"), float("inf"), "", " ", "x" * 300, "é", "\ud800", "\0", "a\nb", "[",
        [], [1, 2], [[1]], [None], [{}], [["a"], "b"], {}, {"a": 1}, (1,), "~", "~nobody-here/x",
    ]  # fmt: skip
    for value in odd:
        said = ""
        try:
            FinderOptions.of(nested(name, value))
        except UsageError as error:
            said = str(error)
        assert "\n" not in said and len(said) < 700, value


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
def test_right_values_pass(options: Mapping[str, Any]) -> None:
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
        (
            "finder",
            {"start_index": start, "end_index": end},
            f"start_index={start} end_index={end}: the range is empty",
        )
        for start, end in ((5, 3), (3, 3), (0, 0))
    ),
    *(
        (
            "finder",
            {"stage": stage, name: "refcoco"},
            f"^{name}=: stage={stage} does not read it; write {way}",
        )
        for name, (stage, way) in UNREAD.items()
    ),
    *(
        ("finder", {"stage": "find", **wrong}, f"^{name}=: stage=find does not read it; write stage={way}")
        for name, wrong, way in (
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


@pytest.mark.parametrize(("program", "options", "said"), REFUSED)
def test_options_that_do_not_go_together(program: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        PROGRAMS[program].of(options)


def test_the_first_options_may_be_given_to_any_stage() -> None:
    """Scripts of theirs set them once for all stages."""
    given = FinderOptions.of({"stage": "find", "max_new_tokens": 4, "attention_format": "safetensors"})
    assert given.max_new_tokens == 4


def test_a_missing_option_is_named_with_its_stage() -> None:
    with pytest.raises(UsageError, match="query= is missing: stage=collect needs image_file and query"):
        FinderOptions.of({"stage": "collect", "image_file": "a.png"}).require("image_file", "query")


def test_the_page_of_the_options_is_up_to_date() -> None:
    """Made by `python docs/build_options.py`."""
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert run_path(str(ROOT / "docs" / "build_options.py"))["markdown"]() in page

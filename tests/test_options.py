"""Every config composes, every option is explained, and every wrong value is named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from itertools import product
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from localization_heads.apps.finder_stages import STAGES as FINDER_STAGES
from localization_heads.apps.frontdoor import quote_free_text
from localization_heads.errors import UsageError
from localization_heads.experiments.catalogue import EXPERIMENTS
from localization_heads.experiments.paper import REASON_SPLITS, SPLITS
from localization_heads.options import BENCHMARKS, RULES, STAGES, check_options, require
from localization_heads.options import EXPERIMENTS as EXPERIMENT_NAMES
from localization_heads.options.groups import CriteriaOptions, GroundingOptions
from localization_heads.stages.run import Run

CONFIG = files("localization_heads") / "config"
APPLICATIONS = ("finder", "visualize", "chat", "demo")
GROUPS = {
    group: sorted(f.name.removesuffix(".yaml") for f in (CONFIG / group).iterdir() if f.name.endswith("yaml"))
    for group in ("model", "criteria", "grounding", "data", "segmenter")
}


def config_files(group: str) -> list[str]:
    return sorted(f.name.removesuffix(".yaml") for f in (CONFIG / group).iterdir() if f.name.endswith("yaml"))


WITHOUT_RULE = {
    "model.heads": "ModelSpec reads them",
}
"""Options that options.py has no rule for, and who checks them instead."""


def composed(application: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_module("localization_heads.config", version_base="1.3"):
        options = OmegaConf.to_container(compose(application, list(overrides)), resolve=True)
    assert isinstance(options, dict)
    return {str(name): value for name, value in options.items()}


def leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`model.name` and so on."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


RUNGS = ("none", "published", "padding", "hull", "fixed", "masks", "mask_box", "points")


def yaml_files() -> list[str]:
    groups = [f"{group}/{choice}" for group, choices in GROUPS.items() for choice in choices]
    return [*APPLICATIONS, *groups]


def test_the_shipped_choices() -> None:
    assert {"tiny", "llava", "llava-13b"} <= set(GROUPS["model"])
    assert {"paper", "published"} <= set(GROUPS["criteria"]) & set(GROUPS["grounding"])
    assert {"examples", "scenes"} <= set(GROUPS["data"])


def test_the_presets_are_the_readings_that_they_name() -> None:
    """Each as the table of docs/reproducing-the-paper.md has it; `paper` is what the code does without options."""
    criteria, grounding = (
        {choice: composed("finder", f"{group}={choice}")[group] for choice in GROUPS[group]}
        for group in ("criteria", "grounding")
    )
    assert CriteriaOptions(**criteria["paper"]) == CriteriaOptions()
    assert GroundingOptions(**grounding["paper"]) == GroundingOptions()
    june = CriteriaOptions(
        "mass", 0.001, "index", 0, elbow_heads="all", per_sample=True, ties="order", fallback="order"
    )
    assert CriteriaOptions(**criteria["published"]) == june
    dropped = {"exclude_layers": 2, "bottom_row_filter": True, "bottom_row_above": 0.05}
    august = replace(june, elbow="value", means=2, fallback="sum", **dropped)
    assert CriteriaOptions(**criteria["published_august"]) == august
    of_all_cells = GroundingOptions(kernel_size=9, component="all", ignore_padding=True, border="repeat")
    assert GroundingOptions(**grounding["published"]) == of_all_cells
    assert set(grounding) == {"paper", "published"}  # no other box was ever published
    dropping = {rung: composed("finder", f"rung={rung}")["drop_lone_spaces"] for rung in RUNGS}
    assert {rung for rung, drops in dropping.items() if drops} == {"published", "padding", "hull"}


def test_a_label_can_name_what_is_swept() -> None:
    """As docs/grounding.md has it: each evaluation of a sweep gets a folder of its own."""
    label = "model.label='${grounding.binarise}'"
    assert quote_free_text(label) == label
    assert composed("finder", "grounding.binarise=otsu", label)["model"]["label"] == "otsu"


PRESETS = [f"{group}={choice}" for group in ("experiment", "rung") for choice in config_files(group)]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_experiment_and_every_rung_composes(preset: str) -> None:
    group, _, choice = preset.partition("=")
    options = composed("finder", preset)
    run = Run(options)
    if group == "rung":
        assert options["rung"]["name"] == choice
    elif choice not in ("all", "base", "none"):
        assert options["experiment"]["names"] == [choice]
    assert run.criteria and run.grounding


def test_the_experiments_are_those_of_the_catalogue() -> None:
    single = [*EXPERIMENTS, "ladder"]
    assert sorted(single) == sorted(set(config_files("experiment")) - {"all", "base", "none"})
    assert list(EXPERIMENT_NAMES) == single
    assert composed("finder", "experiment=all")["experiment"]["names"] == list(EXPERIMENTS)
    assert (*SPLITS, *REASON_SPLITS) == BENCHMARKS


def test_a_scene_cannot_be_cut_higher_than_it_is() -> None:
    with pytest.raises(UsageError, match=r"^scenes\.height=300: .*256 rows"):
        check_options({"scenes": {"size": 256, "height": 300}})
    check_options({"scenes": {"size": 256, "height": 256}})


def test_the_rungs_of_the_ladder_are_in_order() -> None:
    """What the multirun climbs is every preset there is, by its number."""
    ladder = yaml.safe_load((CONFIG / "experiment" / "ladder.yaml").read_text())
    climbed = ladder["hydra"]["sweeper"]["params"]["rung"].split(",")
    steps = {rung: composed("finder", f"rung={rung}")["rung"]["step"] for rung in config_files("rung")}
    assert climbed == sorted(set(steps) - {"none"}, key=lambda rung: steps[rung])
    assert len(set(steps.values())) == len(steps)


MODELS = [(model, "paper", "paper", "examples", "grabcut") for model in GROUPS["model"] if model != "base"]
RECIPES = list(product(["tiny"], GROUPS["criteria"], GROUPS["grounding"], GROUPS["data"], ["grabcut"]))
RECIPES += [("tiny", "paper", "paper", "examples", segmenter) for segmenter in GROUPS["segmenter"]]


@pytest.mark.parametrize("choices", [*MODELS, *RECIPES], ids=" ".join)
def test_every_choice_composes_and_passes_its_rules(choices: tuple[str, ...]) -> None:
    """Also into the objects that the stages work with."""
    overrides = [f"{group}={choice}" for group, choice in zip(GROUPS, choices, strict=True)]
    run = Run(composed("finder", *overrides), model_choice=choices[0])
    assert run.spec.name
    assert run.criteria
    assert run.grounding


@pytest.mark.parametrize("application", APPLICATIONS)
def test_every_application_composes(application: str) -> None:
    check_options(composed(application))


@pytest.mark.parametrize("name", yaml_files())
def test_every_option_has_a_comment_above_it(name: str) -> None:
    """A comment may stand above several lines that go together; Hydra's own block needs none."""
    text = (CONFIG / f"{name}.yaml").read_text(encoding="utf-8").split("\nhydra:\n")[0]
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not line.startswith("# @package")]
        options = [
            i for i, line in enumerate(lines) if re.match(r"\s*(- )?\w+:", line) and "override" not in line
        ]
        for i in options:
            if lines[i].strip() in ("defaults:", "scenes:", "doctor:", "phrases:") or re.match(
                r"  - \w+:", lines[i]
            ):
                continue
            if name.startswith("model/") and name != "model/base":
                continue  # base explains every option once; the others say only what is special
            above = [line for line in lines[:i] if line.lstrip().startswith("#") and "---" not in line]
            assert above, f"{name}.yaml: {lines[i].strip()} has no comment"


@pytest.mark.parametrize("application", APPLICATIONS)
def test_every_option_has_a_rule_or_a_reason(application: str) -> None:
    without = [name for name in leaves(composed(application)) if name not in RULES]
    assert not [name for name in without if name not in WITHOUT_RULE]


def test_every_rule_is_about_an_option_that_exists() -> None:
    known = {name for application in APPLICATIONS for name in leaves(composed(application))}
    known |= {
        name for choice in GROUPS["segmenter"] for name in leaves(composed("finder", f"segmenter={choice}"))
    }
    known |= set(leaves(composed("finder", "engine=ray")))
    assert set(RULES) <= known
    assert set(WITHOUT_RULE) <= known


def test_every_file_of_a_group_has_the_same_options() -> None:
    """Or changing the choice would change what the command line knows."""
    for group in ("criteria", "grounding"):  # the files of model/ build on base.yaml
        choices = GROUPS[group]
        keys = {
            choice: set(yaml.safe_load((CONFIG / group / f"{choice}.yaml").read_text())) for choice in choices
        }
        assert len({frozenset(found) for found in keys.values()}) == 1, (group, keys)


def test_every_stage_has_its_function() -> None:
    assert set(STAGES) == set(FINDER_STAGES)


def test_the_options_of_the_seed_are_there() -> None:
    """Names that users' scripts hold."""
    seed = (
        "stage image_file query attention_file top_k output_dir data_file batch_size visualize_batch show_plot "
        "save_id process_all start_index end_index max_new_tokens random_seed device conv_mode"
    )
    assert set(seed.split()) <= set(composed("finder"))
    viewer = "mode attention_file layer head show_components top_k data_file output_dir save_fig show_plot"
    assert set(viewer.split()) <= set(composed("visualize"))
    assert {"query", "image_file", "cli_mode"} <= set(composed("chat"))


WRONG = {
    "stage": ["nap", None, 5],
    "top_k": [0, -1, 1.5, "three", None, True, 101],
    "batch_size": [0, "8", 4097],
    "process_all": ["yes", 1, None],
    "end_index": [-2],
    "random_seed": [-1, 2**32],
    "attention_format": ["npz"],
    "conv_mode": ["vicuna"],
    "visualize_limit": [-1],
    "query": ["", "  ", ["a"], True],
    "image_file": [["a"], ""],
    "k": [0, 10_001],
    "top_n": [0, 10_001],
    "num_trials": [0, 1001],
    "output_dir": [None, "", ["a"]],
    "criteria.threshold": [-1, "median", float("nan"), float("inf"), True],
    "criteria.tau": [-0.1, "x", float("nan")],
    "criteria.entropy": ["volume"],
    "criteria.means": [0, 0.9, None, True, "two", float("nan")],
    "drop_lone_spaces": ["some", None, 1],
    "criteria.elbow_heads": ["most", None, 2],
    "criteria.per_sample": ["sometimes", None, 1],
    "criteria.ties": ["layer", None, True],
    "criteria.fallback": ["five", None, False],
    "criteria.bottom_row_above": [-0.1, "x", True],
    "grounding.kernel_size": [2, 0, -1, 1.0, 65],
    "grounding.sigma": [-1, float("inf")],
    "grounding.upsample": [0, 17],
    "grounding.interpolation": ["cubic"],
    "grounding.binarise": ["median", None],
    "grounding.top_mass": [0, 1.01, -0.5, True, "half", float("nan")],
    "grounding.box_from": ["air"],
    "grounding.means": [0, 0.5, None, True, float("inf")],
    "grounding.margin": [-0.001, None, "x"],
    "grounding.border": ["reflect", None],
    "segmenter.kind": ["magic"],
    "segmenter.prompt": [[], "box", ["box", "scribble"], ["box", "box"], [["box"]]],
    "segmenter.num_points": [0, 101],
    "segmenter.iterations": [0],
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
    group, _, key = name.rpartition(".")
    options = {group: {key: value}} if group else {key: value}
    with pytest.raises(UsageError, match=rf"^{re.escape(name)}=.*: ") as caught:
        check_options(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", RULES)
def test_no_value_upsets_a_rule(name: str) -> None:
    """It passes or is refused in one line, whatever Hydra's grammar or a program makes of it."""
    odd: list[Any] = [
        None,
        True,
        -1,
        10**400,
        0.5,
        float("nan"),
        float("inf"),
        "",
        " ",
        "x" * 300,
        "é",
        "\ud800",
        "\0",
    ]
    odd += [
        "a\nb",
        "[",
        [],
        [1, 2],
        [[1]],
        [None],
        [{}],
        [["a"], "b"],
        {},
        {"a": 1},
        (1,),
        "~",
        "~nobody-here/x",
    ]
    for value in odd:
        problem = RULES[name](value)
        assert problem is None or (problem and "\n" not in problem and len(problem) < 400), value


@pytest.mark.parametrize(
    "options",
    [
        {"query": 5},
        {"visualize_limit": None},
        {"criteria": {"threshold": 0.001, "tau": 0}},
        {"model": {"system": "", "label": None, "quantization": "4bit"}},
        {"end_index": -1},
        {"start_index": 5, "end_index": -1},
        {"start_index": 5, "end_index": 6},
        {"mode": "single", "output_dir": None},
        {"batch_size": 4096, "num_trials": 1000, "k": 10_000, "grounding": {"kernel_size": 63}},
        {"unknown": "is Hydra's to refuse"},
    ],
)
def test_right_values_pass(options: Mapping[str, Any]) -> None:
    check_options(options)


@pytest.mark.parametrize(
    ("name", "stage", "way"),
    [
        ("image_file", "batch", "stage=collect or pipeline or ground or doctor"),
        ("query", "find", "stage=collect or pipeline"),
        ("save_id", "evaluate", "stage=collect or pipeline"),
        ("attention_file", "batch", "stage=analyze or visualize"),
        ("dataset", "batch", "stage=prepare"),
    ],
)
def test_an_option_that_the_stage_does_not_read_is_said(name: str, stage: str, way: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}=: stage={stage} does not read it; write {way}"):
        check_options({"stage": stage, name: "refcoco"})
    check_options({"stage": stage, name: None})


@pytest.mark.parametrize(("start", "end"), [(5, 3), (3, 3), (0, 0)])
def test_an_empty_range_is_said(start: int, end: int) -> None:
    with pytest.raises(UsageError, match=f"start_index={start} end_index={end}: the range is empty"):
        check_options({"start_index": start, "end_index": end})


def test_a_missing_option_is_named_with_its_stage() -> None:
    with pytest.raises(UsageError, match="query= is missing: stage=collect needs image_file and query"):
        require({"stage": "collect", "image_file": "a.png", "query": None}, "image_file", "query")


@pytest.mark.parametrize(
    ("application", "segmenter", "way"),
    [("finder", ["segmenter=none"], "segmenter=grabcut"), ("visualize", [], "stage=visualize")],
)
def test_a_box_of_a_mask_needs_a_mask(application: str, segmenter: list[str], way: str) -> None:
    with pytest.raises(UsageError, match=f"grounding.box_from=mask needs a segmenter, .*{way}"):
        check_options(composed(application, "grounding.box_from=mask", *segmenter))

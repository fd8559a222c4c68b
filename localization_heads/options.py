"""Every option's rule in one table: `check_options` turns a wrong value into one line that names the option."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from localization_heads.errors import UsageError
from localization_heads.lvlm.answers import FORMATS
from localization_heads.store.paths import check_id, from_home

Kind = Literal["value", "text", "path", "texts", "paths"]


@dataclass(frozen=True)
class Rule:
    """What an option takes.

    Args:
        problem: says what a value must be, or None if it is fine.
        kind: how the command line reads it: a `value` by Hydra's grammar, a `text` as it was typed, a `path` likewise
            and with `~` for the home folder; `texts` and `paths` are a list `[A,B]` of them, or one.
    """

    problem: Callable[[Any], str | None]
    kind: Kind = "value"

    def __call__(self, value: Any) -> str | None:
        return self.problem(value)


def did_you_mean(written: str, choices: Iterable[str]) -> str:
    """A question to begin a hint with, or nothing.

    >>> did_you_mean("LLaVa", ["tiny", "llava"]), did_you_mean("x", ["tiny"])
    ('did you mean llava? ', '')
    """
    near = difflib.get_close_matches(written[:100].lower(), list(choices), 1)
    return f"did you mean {near[0]}? " if near else ""


def one_of(*choices: str) -> Rule:
    def rule(value: Any) -> str | None:
        near = did_you_mean(value, choices) if isinstance(value, str) else ""
        return None if value in choices else f"{near}choose one of {', '.join(choices)}"

    return Rule(rule)


def some_of(*choices: str) -> Rule:
    """A list of different ones, not empty."""

    def rule(value: Any) -> str | None:
        fits = isinstance(value, (list, tuple)) and 0 < len(value) == len({str(item) for item in value})
        fits = fits and all(item in choices for item in value)
        return (
            None
            if fits
            else f"give a list of some of {', '.join(choices)}, such as [{','.join(choices[:2])}]"
        )

    return Rule(rule)


def whole(least: int, most: int | None = None) -> Rule:
    """An integer in a range; `true` is not one."""

    def rule(value: Any) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool)
        fits = fits and value >= least and (most is None or value <= most)
        upper = f" and at most {most}" if most is not None else ""
        return None if fits else f"give a whole number of at least {least}{upper}"

    return Rule(rule)


def number(least: float) -> Rule:
    def rule(value: Any) -> str | None:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
        fits = fits and (isinstance(value, float) or abs(value) < 2**63)
        return None if fits and value >= least else f"give a number of at least {least:g}"

    return Rule(rule)


@Rule
def share(value: Any) -> str | None:
    """A part of a whole, never nothing."""
    problem = number(0)(value)
    return "give a number above 0 and at most 1" if problem or not 0 < value <= 1 else None


@Rule
def odd(value: Any) -> str | None:
    """A kernel has a middle, and one wider than any grid smooths nothing more."""
    return whole(1, 63)(value) or (None if value % 2 else "give an odd number")


def list_of(rule: Rule, least: int = 0) -> Rule:
    """A list of at least that many values that each obey the rule."""

    def every(value: Any) -> str | None:
        if not isinstance(value, (list, tuple)) or len(value) < least:
            return f"give a list such as [A,B]{f' of at least {least}' if least else ''}"
        problems = (rule(item) for item in value)
        return next((f"in the list, {problem}" for problem in problems if problem), None)

    return Rule(every)


@Rule
def portion(value: Any) -> str | None:
    return number(0)(value) or (None if value <= 1 else "give a number from 0 to 1")


@Rule
def switch(value: Any) -> str | None:
    return None if isinstance(value, bool) else "give true or false"


def _is_text(value: Any) -> str | None:
    """Not empty; a number is taken as it is written."""
    fits = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return None if fits and str(value).strip() else "give a text"


def _are_texts(value: Any) -> str | None:
    fits = all(
        isinstance(item, str) and item.strip() for item in (value if isinstance(value, list) else [value])
    )
    return None if fits else "give a list such as [A,B]"


def _is_sentence(value: Any) -> str | None:
    """Also an empty one."""
    return None if isinstance(value, str) else "give a text"


def _is_folder_name(value: Any) -> str | None:
    """One plain name: files are written into it."""
    try:
        check_id(value if isinstance(value, str) else "")
    except ValueError:
        return "give a plain folder name"
    return None


def _are_heads(value: Any) -> str | None:
    """Their names are read, and the file, when it is known which model they are of."""
    if isinstance(value, str) and ("," in value or value[:1] == "[") and not value.endswith(".json"):
        return "give one value; a list is written [A,B]"
    if isinstance(value, bool) or not isinstance(value, (str, int, list, tuple)) or value == "":
        return "write auto, greedy, a heads.json, a hub repository user/repo, or a list such as [14-24,14-13]"
    return None


word = Rule(_is_text)
"""A text of a few words that Hydra's grammar can read, so that a sweep can go over it."""
text = Rule(_is_text, "text")
path = Rule(_is_text, "path")
paths = Rule(_are_texts, "paths")
sentence = Rule(_is_sentence, "text")
folder_name = Rule(_is_folder_name, "text")


def or_null(rule: Rule) -> Rule:
    def either(value: Any) -> str | None:
        problem = None if value is None else rule(value)
        return f"{problem}, or null" if problem else None

    return replace(rule, problem=either)


def or_word(word: str, rule: Rule) -> Rule:
    def either(value: Any) -> str | None:
        problem = None if value == word else rule(value)
        return f"{problem}, or write {word}" if problem else None

    return replace(rule, problem=either)


STAGES = (
    "batch",
    "find",
    "rank",
    "pipeline",
    "ground",
    "evaluate",
    "collect",
    "analyze",
    "visualize",
    "scenes",
    "doctor",
    "experiment",
    "export",
    "prepare",
)

EXPERIMENTS = (
    "fig3",
    "fig6a",
    "fig6b",
    "random",
    "tab1",
    "tab2",
    "tab3",
    "tab4",
    "tab5",
    "tab8",
    "fig13",
    "fig14",
    "ladder",
)

BENCHMARKS = (
    *(f"{dataset}-{split}" for dataset in ("refcoco", "refcoco+") for split in ("val", "testA", "testB")),
    *(f"{dataset}-{split}" for dataset in ("refcocog", "reasonseg") for split in ("val", "test")),
)

RULES: dict[str, Rule] = {
    "stage": one_of(*STAGES),
    "mode": one_of("single", "batch"),
    "image_file": or_null(path),
    "allow_private_addresses": switch,
    "query": or_null(text),
    "attention_file": or_null(path),
    "data_file": or_null(path),
    "host": text,
    "port": or_null(whole(1, 65535)),
    "open_browser": switch,
    "output_dir": or_null(path),
    "save_id": or_null(text),
    "process_all": switch,
    "start_index": whole(0),
    "end_index": whole(-1),
    "attention_format": one_of("pkl", "safetensors"),
    "visualize_batch": switch,
    "visualize_limit": or_null(whole(0)),
    "top_k": whole(1, 100),
    "show_plot": switch,
    "report": switch,
    "report_samples": whole(0, 1000),
    "save_fig": switch,
    "show_components": switch,
    "cli_mode": switch,
    "conv_mode": or_null(one_of("referseg", "chat", "plain")),
    "query_token": one_of("last", "expression_end", "expression_mean", "answer_first"),
    "drop_lone_spaces": switch,
    "view": one_of("combined", "whole", "tiles"),
    "doctor.check": or_null(switch),
    "batch_size": or_word("auto", whole(1, 4096)),
    "picture_memory": whole(0),
    "device": word,
    "num_threads": or_null(whole(1)),
    "max_new_tokens": whole(0),
    "heads": Rule(_are_heads, "paths"),
    "k": whole(1, 10_000),
    "top_n": or_null(whole(1, 10_000)),
    "num_trials": whole(1, 1000),
    "num_samples": whole(1),
    "random_seed": whole(0, 2**32 - 1),
    "layer": or_null(whole(0)),
    "head": or_null(whole(0)),
    "debug": switch,
    "scenes.count": whole(1, 100_000),
    "scenes.seed": whole(0, 1_000_000),
    "scenes.split": one_of("test", "validation", "train"),
    "scenes.style": or_null(one_of("noto", "twemoji", "fluent", "openmoji")),
    "scenes.size": whole(32, 2048),
    "scenes.height": or_null(whole(16, 2048)),
    "scenes.folder": path,
    "dataset": or_null(one_of("refcoco", "refcoco+", "refcocog", "reasonseg")),
    "dataset_path": or_null(path),
    "images": or_null(path),
    "split": one_of("train", "val", "test", "testA", "testB"),
    "exclude": or_null(paths),
    "allow_leakage": switch,
    "dataset_folder": path,
    "criteria.entropy": one_of("area", "mass"),
    "criteria.threshold": or_word("mean", number(0)),
    "criteria.elbow": one_of("value", "index"),
    "criteria.elbow_heads": one_of("considered", "all"),
    "criteria.per_sample": switch,
    "criteria.ties": one_of("sum", "order"),
    "criteria.fallback": one_of("none", "order", "sum"),
    "criteria.exclude_layers": whole(0),
    "criteria.bottom_row_filter": switch,
    "criteria.tau": or_null(number(0)),
    "criteria.means": number(1),
    "criteria.bottom_row_above": or_null(number(0)),
    "grounding.kernel_size": odd,
    "grounding.sigma": number(0),
    "grounding.upsample": whole(1, 16),
    "grounding.component": one_of("largest_hull", "all"),
    "grounding.ignore_padding": switch,
    "grounding.means": number(1),
    "grounding.margin": number(0),
    "grounding.border": one_of("mirror", "repeat"),
    "experiment.names": list_of(one_of(*EXPERIMENTS)),
    "experiment.benchmark": or_null(one_of(*BENCHMARKS)),
    "experiment.ks": list_of(whole(1, 10_000), 1),
    "experiment.sigmas": list_of(number(0), 1),
    "experiment.kernels": list_of(odd, 1),
    "experiment.taus": or_null(list_of(number(0), 1)),
    "experiment.top_ns": list_of(whole(1, 10_000), 1),
    "experiment.min_frequency": portion,
    "experiment.random_sets": whole(2, 1000),
    "rung.step": whole(0, 100),
    "rung.name": folder_name,
    "rung.about": text,
    "rung.segmenter": one_of("none", "chosen", "points"),
    "grounding.interpolation": one_of("nearest", "bilinear"),
    "grounding.binarise": one_of("mean", "otsu", "top_mass"),
    "grounding.top_mass": share,
    "grounding.box_from": one_of("map", "mask"),
    "segmenter.kind": one_of("none", "grabcut", "sam", "sam2", "sam3"),
    "segmenter.name": path,
    "segmenter.prompt": some_of("box", "points", "map"),
    "segmenter.num_points": whole(1, 100),
    "segmenter.multimask": switch,
    "segmenter.iterations": whole(1, 100),
    "segmenter.device": or_null(word),
    "phrases.by": one_of("split", "spacy", "whole"),
    "phrases.model": path,
    "model.name": path,
    "model.label": or_null(folder_name),
    "model.system": or_null(sentence),
    "model.device_map": or_null(word),
    "model.attn_implementation": or_null(one_of("sdpa", "eager", "flash_attention_2")),
    "model.dtype": one_of("auto", "float32", "bfloat16", "float16"),
    "model.quantization": or_null(one_of("4bit", "8bit")),
    "model.pad_to_square": or_null(switch),
    "model.conv_mode": or_null(one_of("referseg", "chat", "plain")),
    "model.top_n": whole(1, 10_000),
    "model.native_box": or_null(one_of(*FORMATS)),
    "controls": switch,
    "native": or_null(switch),
    "bootstrap": one_of("expression", "image"),
    "worst": whole(0, 200),
    "engine.kind": one_of("local", "ray"),
    "engine.num_workers": or_null(whole(1, 10_000)),
    "engine.cpus_per_worker": whole(1, 1024),
    "engine.gpus_per_worker": or_null(number(0)),
    "engine.address": or_null(text),
    "engine.object_store": whole(80),
}

TEXTS = tuple(name for name, rule in RULES.items() if rule.kind != "value")
"""Options whose value, or whose list's items, are any text."""

USED_BY = {
    **dict.fromkeys(("image_file", "query", "save_id"), ("collect", "pipeline", "ground", "doctor")),
    "attention_file": ("analyze", "visualize"),
    **dict.fromkeys(("dataset", "dataset_path", "images"), ("prepare",)),
}
"""Options that are null until somebody means something by them, and the stages of the finder that read them."""

SPREAD_STAGES = ("find", "batch", "ground", "evaluate", "experiment")
"""Those that run the model over a data set."""


def check_options(options: Mapping[str, Any]) -> None:
    """Check every option that is present against its rule.

    Raises:
        UsageError: names the first wrong option, its value and what it takes.
    """
    for name, rule in RULES.items():
        group, key = _holder(options, name)
        if key in group and (problem := rule(value := group[key])):
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            raise UsageError(f"{name}={str(shown)[:200]}: {problem}")
    _check_together(options)


def expand_home(options: Mapping[str, Any]) -> None:
    """Replace `~` at the beginning of every path by the home folder, in place."""
    for name, rule in RULES.items():
        group, key = _holder(options, name)
        if rule.kind in ("path", "paths") and isinstance(group, dict) and key in group:
            value = group[key]
            group[key] = [from_home(item) for item in value] if isinstance(value, list) else from_home(value)


def _holder(options: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], str]:
    """The mapping that an option such as `model.name` is in, empty if there is none, and its name there."""
    group, _, key = name.rpartition(".")
    inner = options.get(group) if group else options
    return inner if isinstance(inner, Mapping) else {}, key


def _check_together(options: Mapping[str, Any]) -> None:
    """What depends on other options."""
    _check_used(options)
    if "mode" not in options and options.get("output_dir", "") is None:  # the viewer alone can do without
        raise UsageError("output_dir=null: give a folder")
    grounding, segmenter = options.get("grounding") or {}, options.get("segmenter") or {}
    if grounding.get("box_from") == "mask" and segmenter.get("kind", "none") == "none":
        way = "such as segmenter=grabcut" if segmenter else "which stage=visualize of the finder has"
        raise UsageError(f"grounding.box_from=mask needs a segmenter, {way}")
    if isinstance(scenes := options.get("scenes"), Mapping):
        _check_height(scenes)
    if (options.get("engine") or {}).get("kind") == "ray":
        _check_spread(options)
    start, end = options.get("start_index", 0), options.get("end_index", -1)
    if 0 <= end <= start:
        raise UsageError(
            f"start_index={start} end_index={end}: the range is empty; end_index is the entry before which to stop"
        )


def _check_used(options: Mapping[str, Any]) -> None:
    """What is named is meant: a stage that would go by it in silence says which ones read it."""
    stage = options.get("stage")
    for name, stages in USED_BY.items() if stage else ():
        if options.get(name) is not None and stage not in stages:
            raise UsageError(f"{name}=: stage={stage} does not read it; write stage={' or '.join(stages)}")


def _check_height(scenes: Mapping[str, Any]) -> None:
    """A scene cannot be cut higher than it is."""
    height, size = scenes.get("height"), scenes.get("size", math.inf)
    if height is not None and height > size:
        raise UsageError(f"scenes.height={height}: the pictures have only scenes.size={size} rows")


def _check_spread(options: Mapping[str, Any]) -> None:
    """Ray gives each worker its GPUs, so the device can only say whether to use any."""
    if (stage := options.get("stage")) not in SPREAD_STAGES:
        raise UsageError(f"engine=ray: stage={stage} has no data set to spread; leave out engine=")
    if options.get("image_file") or options.get("query"):
        raise UsageError("engine=ray: one picture cannot be spread; leave out engine=")
    if (device := options.get("device", "auto")) not in ("auto", "cpu", "cuda", "mps"):
        raise UsageError(f"device={device}: with engine=ray, choose one of auto, cpu, cuda, mps")


def require(options: Mapping[str, Any], *names: str) -> None:
    """Raises UsageError for the first of these options that is missing."""
    for name in names:
        if options.get(name) in (None, ""):
            raise UsageError(f"{name}= is missing: stage={options.get('stage')} needs {' and '.join(names)}")

"""The experiments of the paper: their options, and the presets of `experiment=` and `rung=`.

The presets of all other groups are files of `config/`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from localization_heads.options.declaration import (
    FolderName,
    FromList,
    OddInt,
    Options,
    Text,
    option,
    options,
)

Experiment = Literal[
    "fig3", "fig6a", "fig6b", "random", "tab1", "tab2", "tab3", "tab4", "tab5", "tab8", "fig13", "fig14", "causal",
    "ladder",
]  # fmt: skip
Benchmark = Literal[
    "refcoco-val", "refcoco-testA", "refcoco-testB", "refcoco+-val", "refcoco+-testA", "refcoco+-testB",
    "refcocog-val", "refcocog-test", "reasonseg-val", "reasonseg-test",
]  # fmt: skip


@options
class ExperimentOptions(Options):
    """The experiments of the paper (stage=experiment)."""

    names: Annotated[tuple[Experiment, ...], FromList] = option((), "Experiments to run, in order.")
    benchmark: Benchmark | None = option(
        None,
        "Split that the entries come from, so that results appear beside the paper's; null for other data.",
    )
    ks: Annotated[tuple[Annotated[int, Field(ge=1, le=10_000)], ...], FromList, Field(min_length=1)] = option(
        (1, 2, 3, 4, 5), "Tab. 4: numbers of heads."
    )
    sigmas: Annotated[tuple[Annotated[float, Field(ge=0)], ...], FromList, Field(min_length=1)] = option(
        (0.0, 0.5, 0.8, 1.0, 1.4, 1.8),
        "Tab. 8: standard deviations of the smoothing in cells, with the kernel of grounding.kernel_size.",
    )
    kernels: Annotated[tuple[OddInt, ...], FromList, Field(min_length=1)] = option(
        (1, 3, 5, 7, 9), "Tab. 8: kernel sizes, with the sigma of grounding.sigma."
    )
    taus: Annotated[tuple[Annotated[float, Field(ge=0)], ...], FromList] | None = option(
        None,
        "Fig. 13: thresholds of criterion 1; null uses 0, 1/4, 1/2, 3/4, 1, 5/4, 3/2 and 2 times the elbow.",
    )
    top_ns: Annotated[tuple[Annotated[int, Field(ge=1, le=10_000)], ...], FromList, Field(min_length=1)] = option(
        tuple(range(1, 15)), "Fig. 14: numbers of heads selected per sample."
    )
    min_frequency: float = option(0.01, "Fig. 6b: minimum selection frequency of a head.", ge=0, le=1)
    random_sets: int = option(20, "Number of sets of random heads from the same layers to compare with.", ge=2, le=1000)


@options
class RungOptions(Options):
    """A rung of the ladder (docs/reproducing-the-paper.md): a preset of criteria, grounding, heads and k."""

    step: int = option(0, "Position in the ladder, from 1.", ge=0, le=100)
    name: FolderName = option("none", "Name of the rung.")
    about: Text = option("the options as they are", "What it adds to the previous rung.")
    segmenter: Literal["none", "chosen", "points"] = option(
        "chosen",
        "Masks: none (the map's own), chosen (segmenter=), or points (segmenter= prompted with points as well).",
    )


EXPERIMENTS = tuple(name for name in get_args(Experiment) if name not in ("causal", "ladder"))
"""The figures and tables of the paper (`experiment=all`).

Not among them: the ladder, a sweep over rungs; and `causal`, which runs the model again for each set of heads and needs
entries with a known answer.
"""


def _rung(
    step: int,
    name: str,
    about: str,
    *,
    published: bool = False,
    grounding: str = "paper",
    masks: str = "none",
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The config of a rung, with the criteria and heads of the published code or the paper and further `changes`."""
    criteria, heads, k = ("published", "greedy", 5) if published else ("paper", "auto", 3)
    return {
        "defaults": [{"override /criteria": criteria}, {"override /grounding": grounding}],
        "heads": heads,
        "k": k,
        **({"drop_lone_spaces": True} if published else {}),
        **(changes or {}),
        "rung": {"step": step, "name": name, "about": about, "segmenter": masks},
    }


_MASK_BOX = {"grounding": {"box_from": "mask"}}
_RUNGS = (
    _rung(1, "published", "the published code's box", published=True, grounding="published"),
    _rung(
        2,
        "padding",
        "+ exact padding",
        published=True,
        grounding="published",
        changes={"grounding": {"ignore_padding": False}},
    ),
    _rung(3, "hull", "+ largest hull", published=True),
    _rung(4, "fixed", "+ fixed heads"),
    _rung(5, "masks", "+ the segmenter's masks", masks="chosen"),
    _rung(6, "mask_box", "+ box from the mask", masks="chosen", changes=_MASK_BOX),
    _rung(7, "points", "+ points", masks="points", changes=_MASK_BOX),
)
"""The ladder from the published code's box to the paper's (docs/reproducing-the-paper.md)."""

RUNGS: dict[str, dict[str, Any]] = {rung["rung"]["name"]: rung for rung in _RUNGS}

_LADDER = {
    "experiment": {"names": ["ladder"]},
    "hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"rung": ",".join(RUNGS)}}},
}

TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "experiment": {
        "none": {"names": []},
        **{name: {"names": [name]} for name in EXPERIMENTS},
        "all": {"names": list(EXPERIMENTS)},
        "causal": {"names": ["causal"]},
        "ladder": _LADDER,
    },
    "rung": {"none": {}, **RUNGS},
}
"""Group -> preset -> the options that it changes: those of the group; for a rung, those of the program."""

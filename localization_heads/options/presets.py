"""Choices of `experiment=` and `rung=` as rows of a table; those of the other groups are files of `config/`."""

from __future__ import annotations

from typing import Any, get_args

from localization_heads.options.groups import Experiment

EXPERIMENTS = tuple(name for name in get_args(Experiment) if name != "ladder")
"""The figures and tables of the paper. The ladder, a sweep over rungs, is a command of its own."""


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
    """A rung: its criteria and heads are those of the published code, or the paper's; `changes` are options "
    "besides."""
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
"""From the published code's box to the paper's, step by step (docs/reproducing-the-paper.md)."""

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
        "ladder": _LADDER,
    },
    "rung": {"none": {}, **RUNGS},
}
"""Group, choice, and what the choice changes: options of the group, or of the whole program where it is a rung."""

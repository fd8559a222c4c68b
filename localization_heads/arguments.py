"""What people hand to `ground` and `evaluate` in Python, as the objects that do the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads.errors import ArgumentError, UsageError, shown
from localization_heads.grounder import (
    Grounder,
    check_heads,
    chosen_heads,
    found_with_of,
    load_calibration,
    make_segmenter,
)
from localization_heads.grounding.confidence import Calibration
from localization_heads.heads.head import Head
from localization_heads.heads.record import HeadRanking
from localization_heads.hub import is_repository, load_heads
from localization_heads.options.compose import choices_of, newcomers_grounding, preset
from localization_heads.options.groups import CriteriaOptions, GroundingOptions, SegmenterOptions
from localization_heads.segmentation.segmenter import Segmenter

if TYPE_CHECKING:
    from localization_heads.lvlm.model import LVLM

K = 3
"""Heads that make a box (the paper's k), and that a sample picks for itself."""

Heads = Sequence[Head | tuple[int, int] | str] | HeadRanking | str | Path | None
"""Whose maps are added: a ranking, names such as "L14H24", a heads.json, a hub repository, `auto` or `greedy`."""
ReadOut = GroundingOptions | Mapping[str, Any] | str | None
"""Options, a preset such as "paper", or some options by name, the others being those of the newcomer's preset."""
Masks = Segmenter | SegmenterOptions | str | None
"""A segmenter, its options, or a preset such as "grabcut" or "sam2"; None and "none" leave the map's pseudo-mask."""


def grounder_of(
    lvlm: LVLM, heads: Heads, criteria: CriteriaOptions, options: ReadOut, segmenter: Masks, k: int = K
) -> Grounder:
    """The grounder that the arguments ask for. ArgumentError for what they cannot mean."""
    if not hasattr(lvlm, "attend_batch"):
        raise ArgumentError(f"lvlm: {shown(lvlm)} is no model; lh.load_model makes one of a name or a folder")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ArgumentError(f"k={shown(k)}: the number of heads must be at least 1")
    chosen = tuple(_heads(lvlm, heads, k))
    try:
        check_heads(chosen, lvlm.num_layers, lvlm.num_heads)
    except UsageError as error:
        raise ArgumentError(str(error)) from None
    return Grounder(chosen, criteria, read_out(options), masks(segmenter), k)


def _heads(lvlm: LVLM, heads: Heads, k: int) -> Sequence[Head]:
    """Best first; none where each sample picks its own."""
    named = "these heads"
    if isinstance(heads, str | Path) and is_repository(str(heads)):
        named, heads = f"heads={heads}", load_heads(heads)
    if isinstance(heads, HeadRanking):
        lvlm.note_other_conditions(named, heads.found_with)
        try:
            return heads.top(k)
        except ValueError as error:
            raise ArgumentError(f"heads: {error}") from None
    if heads is None or (isinstance(heads, str) and heads == "auto"):
        return lvlm.heads_auto()[:k]
    if isinstance(heads, str) and heads == "greedy":
        return ()
    if isinstance(heads, str | Path):
        lvlm.note_other_conditions(f"heads={heads}", found_with_of(str(heads)))
        return chosen_heads(str(heads), k)
    try:
        listed = [_head(one) for one in heads]
    except (TypeError, ValueError):
        raise ArgumentError(
            f"heads={shown(heads)}: give a ranking, or a list such as ['L14H24', (14, 13)]"
        ) from None
    if not listed:
        raise ArgumentError("heads names no head; None takes those that are known, or each sample's own")
    return listed


def _head(one: Any) -> Head:
    if isinstance(one, str):
        return Head.parse(one)
    layer, head = one
    return Head(int(layer), int(head))


def read_out(options: ReadOut) -> GroundingOptions:
    """ArgumentError for an unknown preset or option."""
    if options is None:
        return newcomers_grounding()
    if isinstance(options, GroundingOptions):
        return options
    try:
        if isinstance(options, str):
            if options not in choices_of("grounding"):
                raise ArgumentError(
                    f"options={shown(options)}: choose one of {', '.join(choices_of('grounding'))}"
                )
            return GroundingOptions.of(preset("grounding", options))
        return replace(newcomers_grounding(), **options)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"options={shown(options)}: {' '.join(str(error).split())[:200]}") from None


def masks(segmenter: Masks) -> Segmenter | None:
    """ArgumentError for an unknown preset; a SAM is loaded here, so hand in a loaded one where it is asked often."""
    if isinstance(segmenter, str):
        if segmenter not in choices_of("segmenter"):
            raise ArgumentError(
                f"segmenter={shown(segmenter)}: choose one of {', '.join(choices_of('segmenter'))}"
            )
        segmenter = SegmenterOptions.of(preset("segmenter", segmenter))
    if isinstance(segmenter, SegmenterOptions):
        return make_segmenter(segmenter)
    return segmenter


def named_segmenter(segmenter: Masks) -> dict[str, Any]:
    """As `metrics.json` names it."""
    if isinstance(segmenter, SegmenterOptions):
        return asdict(segmenter)
    if isinstance(segmenter, str):
        return {"kind": segmenter}
    return {"kind": "none" if segmenter is None else segmenter.name}


def calibrated(
    grounder: Grounder,
    lvlm: LVLM,
    calibration: Calibration | str | Path | None,
    abstain: float | None = None,
    *,
    zoom: bool = False,
) -> Grounder:
    """The grounder with the calibration, and the presence from which on it takes a thing for present.

    Raises:
        ArgumentError: `abstain` without a calibration.
        UsageError: the calibration cannot be read or does not fit.
    """
    if calibration is None:
        if abstain is not None:
            raise ArgumentError(f"abstain={abstain:g} needs a calibration: stage=calibrate writes one")
        return grounder
    found = calibration if isinstance(calibration, Calibration) else load_calibration(calibration)
    named = "the calibration" if isinstance(calibration, Calibration) else calibration
    found.check(grounder.recipe({**lvlm.choices, **lvlm.asked}, zoom=zoom), named)
    return replace(grounder, calibration=found, abstain=abstain)

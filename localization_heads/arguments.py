"""Converts the arguments of `ground` and `evaluate` to the objects that do the work.

An argument may take several forms: heads as names or a ranking, a read-out as a preset or a mapping, a segmenter by
name. Each function here normalizes one of them, or raises ArgumentError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads.errors import ArgumentError, UsageError, shown
from localization_heads.grounder import Grounder, load_calibration, make_segmenter
from localization_heads.grounding.confidence import Calibration
from localization_heads.head_choice import heads_found_with, resolve_heads
from localization_heads.heads.head import Head, check_heads
from localization_heads.heads.record import HeadRanking
from localization_heads.hub import is_repository, load_heads
from localization_heads.options.compose import choices_of, default_grounding, load_preset
from localization_heads.options.groups import CriteriaOptions, GroundingOptions, SegmenterOptions
from localization_heads.segmentation.segmenter import Segmenter

if TYPE_CHECKING:
    from localization_heads.lvlm.model import LVLM

K = 3
"""Default number of heads whose maps are added (the paper's k)."""

Heads = Sequence[Head | tuple[int, int] | str] | HeadRanking | str | Path | None
"""The heads whose maps are added: names such as "L14H24", a ranking, a heads.json, a hub repository, auto or greedy."""
ReadOut = GroundingOptions | Mapping[str, Any] | str | None
"""A `GroundingOptions`, a preset such as "paper", or a mapping that overrides options of the default preset."""
Masks = Segmenter | SegmenterOptions | str | None
"""A segmenter, its options, or a preset such as "grabcut" or "sam2"; None and "none" keep the map's pseudo-mask."""


def grounder_of(
    lvlm: LVLM, heads: Heads, criteria: CriteriaOptions, options: ReadOut, segmenter: Masks, k: int = K
) -> Grounder:
    """Build the grounder from the arguments.

    Raises:
        ArgumentError: `lvlm` is not a model, `k` is not a positive integer, or a head does not exist.
    """
    if not hasattr(lvlm, "attend_batch"):
        raise ArgumentError(f"lvlm: {shown(lvlm)} is no model; lh.load_model loads one from a name or a folder")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ArgumentError(f"k={shown(k)}: the number of heads must be at least 1")
    chosen = tuple(_resolve_heads(lvlm, heads, k))
    try:
        check_heads(chosen, lvlm.num_layers, lvlm.num_heads)
    except UsageError as error:
        raise ArgumentError(str(error)) from None
    return Grounder(chosen, criteria, read_out(options), masks(segmenter), k)


def _resolve_heads(lvlm: LVLM, heads: Heads, k: int) -> Sequence[Head]:
    """The heads, best first; empty if each sample selects its own."""
    source = "these heads"
    if isinstance(heads, str | Path) and is_repository(str(heads)):
        source, heads = f"heads={heads}", load_heads(heads)
    if isinstance(heads, HeadRanking):
        lvlm.warn_of_other_conditions(source, heads.found_with)
        try:
            return heads.top(k)
        except ValueError as error:
            raise ArgumentError(f"heads: {error}") from None
    if heads is None or (isinstance(heads, str) and heads == "auto"):
        return lvlm.heads_auto()[:k]
    if isinstance(heads, str) and heads == "greedy":
        return ()
    if isinstance(heads, str | Path):
        lvlm.warn_of_other_conditions(f"heads={heads}", heads_found_with(str(heads)))
        return resolve_heads(str(heads), k)
    try:
        listed = [_parse_head(head) for head in heads]
    except (TypeError, ValueError):
        raise ArgumentError(f"heads={shown(heads)}: give a ranking, or a list such as ['L14H24', (14, 13)]") from None
    if not listed:
        raise ArgumentError("heads=[] names no head; None uses the model's known heads, or each sample's own")
    return listed


def _parse_head(value: Any) -> Head:
    if isinstance(value, str):
        return Head.parse(value)
    layer, head = value
    return Head(int(layer), int(head))


def read_out(options: ReadOut) -> GroundingOptions:
    """The read-out options. ArgumentError for an unknown preset or option."""
    if options is None:
        return default_grounding()
    if isinstance(options, GroundingOptions):
        return options
    try:
        if isinstance(options, str):
            if options not in choices_of("grounding"):
                raise ArgumentError(f"options={shown(options)}: choose one of {', '.join(choices_of('grounding'))}")
            return GroundingOptions.of(load_preset("grounding", options))
        return replace(default_grounding(), **options)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"options={shown(options)}: {' '.join(str(error).split())[:200]}") from None


def masks(segmenter: Masks) -> Segmenter | None:
    """The segmenter; None for pseudo-masks. ArgumentError for an unknown preset.

    A preset or options of a SAM load its checkpoint here; pass a loaded segmenter to avoid loading it at every call.
    """
    if isinstance(segmenter, str):
        if segmenter not in choices_of("segmenter"):
            raise ArgumentError(f"segmenter={shown(segmenter)}: choose one of {', '.join(choices_of('segmenter'))}")
        segmenter = SegmenterOptions.of(load_preset("segmenter", segmenter))
    if isinstance(segmenter, SegmenterOptions):
        return make_segmenter(segmenter)
    return segmenter


def named_segmenter(segmenter: Masks) -> dict[str, Any]:
    """The segmenter's settings for `choices` of `metrics.json`."""
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
    """The grounder with a calibration, and with the presence threshold `abstain` if given.

    Args:
        zoom: whether boxes will be refined by a second look, which is part of the recipe that a calibration fits.

    Raises:
        ArgumentError: `abstain` without a calibration.
        UsageError: the calibration cannot be read, or was fitted for another recipe.
    """
    if calibration is None:
        if abstain is not None:
            raise ArgumentError(f"abstain={abstain:g} needs a calibration: stage=calibrate writes one")
        return grounder
    loaded = calibration if isinstance(calibration, Calibration) else load_calibration(calibration)
    source = "the calibration" if isinstance(calibration, Calibration) else calibration
    loaded.check(grounder.recipe({**lvlm.choices, **lvlm.asked}, zoom=zoom), source)
    return replace(grounder, calibration=loaded, abstain=abstain)

"""A grounding as a line of `predictions.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence

from localization_heads.data.masks import encode_mask
from localization_heads.grounding.ground import Grounding
from localization_heads.store.results import ImageShare, Instance, Prediction


def prediction_of(id: str, grounding: Grounding, several: Sequence[Grounding] | None = None) -> Prediction:
    """The mask is the segmenter's; without one, the pseudo-mask. What is absent has neither box nor mask.

    Args:
        several: every object that the expression fits, `grounding` first (`instances=all`).
    """
    there = not grounding.absent
    boxes = None if several is None else [_instance(one) for one in several if there and not one.absent]
    mask = encode_mask(grounding.mask) if not boxes else boxes[0].mask
    return Prediction(
        id,
        bbox=grounding.box if there else None,
        score=grounding.score if there else None,
        mask=mask if there else None,
        heads=grounding.heads,
        boxes=boxes,
        agreement=grounding.agreement,
        confidence=grounding.confidence,
        calibrated=grounding.calibrated,
        presence=grounding.presence,
        absent=grounding.absent,
        image_index=grounding.image_index,
        images=tuple(_share(one) for one in grounding.each),
    )


def _share(one: Grounding) -> ImageShare:
    return ImageShare(one.image_share or 0.0, _instance(one) if one.chosen and not one.absent else None)


def _instance(grounding: Grounding) -> Instance:
    return Instance(grounding.box, grounding.score, encode_mask(grounding.mask), grounding.confidence)

"""`LVLM`: a vision-language model that returns its heads' attention maps of an image for an expression.

Preparing a batch (resizing, tokenizing) and running the model on it are separate steps, so that the next batch can be
prepared in another thread meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from localization_heads.attention import AttentionMaps
from localization_heads.data.sources import PromptImages, image_at
from localization_heads.errors import NotFiniteError, OutOfMemoryError
from localization_heads.heads.criteria import head_statistics
from localization_heads.heads.head import Head
from localization_heads.heads.one_sample import pick_own_heads
from localization_heads.heads.sensitivity import swap_left_right
from localization_heads.lvlm.answers.trace import Trace
from localization_heads.lvlm.asking import attend_with_extras
from localization_heads.lvlm.attention_model import AttentionModel
from localization_heads.lvlm.clips import attend_clip
from localization_heads.lvlm.extra_prompts import (
    NO_EXTRA_PROMPTS,
    ExtraPrompts,
    covers_mirrored_region,
    measure_sensitivity,
    measures_sensitivity,
    sensitivity_prompts,
)
from localization_heads.lvlm.families.table import family_of
from localization_heads.lvlm.image_cache import ImageCache, pixel_digest
from localization_heads.lvlm.sharing import ComputeMaps, EncodedImage, prepare_unshared
from localization_heads.lvlm.tracing import trace_answer
from localization_heads.options.compose import default_grounding
from localization_heads.options.groups import CriteriaOptions, GroundingOptions
from localization_heads.options.stage_groups import DEFAULT_TRACE_TOKENS, TraceOptions

log = logging.getLogger(__name__)

DEFAULT_K = 3
"""Heads that an image and a query pick if none are known (the paper's k)."""


class LVLM(AttentionModel):
    """A vision-language model that returns the attention maps of its heads. Made by `load_model`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.recent = ImageCache()

    def attend(
        self,
        image: PromptImages,
        expression: str,
        *,
        last_layer: int | None = None,
        extra_prompts: ExtraPrompts = NO_EXTRA_PROMPTS,
        siblings: Sequence[str] = (),
    ) -> AttentionMaps:
        """The attention map of every head: from the query token, by default the prompt's last, to the image (Sec. 4.1).

        Args:
            image: RGB image of any size; or several, which one prompt shows together (`AttentionMaps.images`).
            last_layer: stop the forward pass after this layer; the maps of later layers stay zero.
            extra_prompts: other prompts about the image, for contrast and confidence.
            siblings: the other expressions of the image; if there are none, the model lists what it sees.

        Raises:
            NotFiniteError: NaN or infinite attention, as when half precision overflows.
        """
        (maps,) = self.attend_batch(
            [image], [expression], last_layer=last_layer, extra_prompts=extra_prompts, siblings=[siblings]
        )
        maps.check_finite()
        return maps

    def attend_batch(
        self,
        images: Sequence[PromptImages],
        expressions: Sequence[str],
        *,
        last_layer: int | None = None,
        prepared: PreparedBatch | None = None,
        extra_prompts: ExtraPrompts = NO_EXTRA_PROMPTS,
        siblings: Sequence[Sequence[str]] | None = None,
    ) -> list[AttentionMaps]:
        """`attend` for several pairs, in their order. The maps are not checked for finite values; the caller does that.

        An image that occurs several times, as the same object, is encoded once for all its expressions; the others
        go through the model in one forward pass.

        Args:
            prepared: the same pairs from `prepare`, if `can_prepare`.
            extra_prompts: as for `attend`. With any, the batch is processed image by image.
            siblings: for each pair, the other expressions of its image.
        """
        if self.can_prepare(extra_prompts):
            return (prepared or self.prepare(images, expressions)).run(last_layer)
        siblings = siblings or [()] * len(images)
        results: dict[int, AttentionMaps] = {}
        for indices in _group_by_image(images):
            encoded = EncodedImage(self, images[indices[0]])
            texts, others = [expressions[i] for i in indices], [siblings[i] for i in indices]
            maps = attend_with_extras(encoded, texts, others, extra_prompts, last_layer)
            results |= zip(indices, maps, strict=True)
        return [results[i] for i in range(len(images))]

    def can_prepare(self, extra_prompts: ExtraPrompts = NO_EXTRA_PROMPTS) -> bool:
        """Whether each pair is a single prompt, so that `prepare` can run ahead of the model."""
        return not extra_prompts and not self.paraphrases

    def prepare(self, images: Sequence[PromptImages], expressions: Sequence[str]) -> PreparedBatch:
        """The CPU part of `attend_batch`, which may run ahead of the model in another thread."""
        parts: list[tuple[Sequence[int], ComputeMaps]] = []
        unshared: list[int] = []
        runs_alone = family_of(self.model.config).one_image_per_batch
        for indices in _group_by_image(images):
            image = images[indices[0]]
            shares = len(indices) > 1 and not self.why_not_shared
            if not shares and not runs_alone and isinstance(image, Image.Image):
                unshared += indices
                continue
            encoded = EncodedImage(self, image)
            prompts = [encoded.prepare(expressions[i]) for i in indices]
            parts.append((indices, partial(encoded.attend_prepared, prompts)))
        if unshared:
            pairs = [images[i] for i in unshared], [expressions[i] for i in unshared]
            parts.append((unshared, prepare_unshared(self, *pairs)))
        return PreparedBatch(parts)

    def attend_mirrored(self, image: Image.Image, expression: str, maps: AttentionMaps) -> NDArray[np.float32] | None:
        """The maps of the mirrored image with left and right swapped in the expression, for the sensitivity.

        Args:
            maps: those of the original image.

        Returns:
            Not mirrored back. None if they cannot be compared with `maps`, or the model cannot take the image.
        """
        try:
            mirrored = self.attend(ImageOps.mirror(image), swap_left_right(expression))
        except (NotFiniteError, OutOfMemoryError) as error:
            log.warning("%r: the mirrored image could not be asked: %s", expression, error)
            return None
        return mirrored.attention if covers_mirrored_region(maps, mirrored) else None

    def attend_clip(
        self,
        frames: Sequence[Image.Image],
        expression: str,
        times: Sequence[float] | None = None,
        *,
        last_layer: int | None = None,
    ) -> list[AttentionMaps]:
        """The maps of each frame of a clip that the model is shown as a video, in one prompt (`video=native`).

        Args:
            frames: RGB images of one size, in order. Frames that the family merges have the same map.
            times: of the frames, in seconds; None assumes two frames a second.

        Raises:
            UsageError: the family's video tokens are not supported.
        """
        return attend_clip(self, frames, expression, times, last_layer)

    def trace(
        self,
        image: Image.Image,
        query: str,
        heads: Sequence[Head] | None = None,
        *,
        max_new_tokens: int = DEFAULT_TRACE_TOKENS,
        trace: TraceOptions | None = None,
        options: GroundingOptions | None = None,
    ) -> Trace:
        """Where heads look while the model writes each word of its answer to a query, greedily.

        Args:
            image: RGB image of any size.
            heads: whose maps are kept; None takes the known heads that fit this prompt and query token, or else the
                three that this image and query pick.
            max_new_tokens: length of the longest answer, in tokens.
            trace: which step belongs to a word, and which maps are kept.
            options: how maps become boxes; by default as in `ground`, without contrast.

        Raises:
            UsageError: an unusable query, several images, or a head that the model does not have.
            NotFiniteError: NaN or infinite attention.
        """
        image = image_at(image, None)
        chosen = tuple(Head(*head) for head in heads or self.heads_auto() or self.pick_own_heads(image, query))
        return trace_answer(
            self,
            image,
            query,
            chosen,
            max_new_tokens=max_new_tokens,
            options=trace or TraceOptions(),
            grounding=options or default_grounding(),
        )

    def pick_own_heads(
        self, image: Image.Image, query: str, criteria: CriteriaOptions | None = None, k: int = DEFAULT_K
    ) -> list[Head]:
        """The heads that this image and query alone select. NoHeadError if none passes the criteria."""
        criteria = criteria or CriteriaOptions()
        maps = self.attend(image, query, extra_prompts=sensitivity_prompts(criteria))
        sensitivity = measure_sensitivity(maps, None) if measures_sensitivity(criteria) else None
        return pick_own_heads(head_statistics(maps.attention, criteria), criteria, k, sensitivity)

    def encode_image(self, image: PromptImages, *, last_layer: int | None = None) -> EncodedImage:
        """Encode an image once, to ask about many expressions: `lvlm.encode_image(image).attend(["the dog", ...])`.

        Args:
            image: RGB image of any size.
            last_layer: the deepest layer that will be asked for (early exit); None for all.
        """
        encoded = EncodedImage(self, image)
        encoded.encode(last_layer)
        return encoded

    def ask(
        self,
        image: PromptImages,
        expressions: Sequence[str],
        *,
        last_layer: int | None = None,
        extra_prompts: ExtraPrompts = NO_EXTRA_PROMPTS,
    ) -> list[AttentionMaps]:
        """`encode_image(image).attend(expressions)` with a cache of recent images, for conversations.

        Images are recognised by their pixels, and evicted once `recent.max_bytes` are in use. The siblings of each
        expression are the others. NotFiniteError as for `attend`.
        """
        settings = (self.conv_mode, self.system, self.query_token, self.view, self.dropped_token)
        key = (pixel_digest(image), *settings, self.answer_tokens, self.answer_span, self.paraphrases)
        try:
            encoded = self.recent.get(key, lambda: EncodedImage(self, image))
            siblings = [expressions] * len(expressions)
            results = attend_with_extras(encoded, expressions, siblings, extra_prompts, last_layer)
            for maps in results:
                maps.check_finite()
            return results
        finally:
            self.recent.evict()


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """Pairs of image and expression, prepared for the model in parts; each part with the pairs' indices."""

    parts: Sequence[tuple[Sequence[int], ComputeMaps]]

    def run(self, last_layer: int | None) -> list[AttentionMaps]:
        """The maps of all pairs, in their original order."""
        results: dict[int, AttentionMaps] = {}
        for indices, compute in self.parts:
            results |= zip(indices, compute(last_layer), strict=True)
        return [results[i] for i in sorted(results)]


def _group_by_image(images: Sequence[PromptImages]) -> list[list[int]]:
    """The indices of each distinct image object, in order of first occurrence."""
    groups: dict[int, list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(id(image), []).append(index)
    return list(groups.values())

"""`LVLM`: a model that can be asked which parts of an image its heads attend to for an expression.

Batches are made ready on the host and then run by the model. The two halves may be in different threads: while the
model runs one batch, the images of the next are resized and its prompts tokenized. Images asked about recently stay
encoded.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from localization_heads.attention import AttentionMaps
from localization_heads.data.sources import PromptImages, image_at, images_of
from localization_heads.errors import NotFiniteError, OutOfMemoryError
from localization_heads.heads.criteria import head_statistics
from localization_heads.heads.head import Head
from localization_heads.heads.one_sample import pick_own_heads
from localization_heads.heads.sensitivity import swap_left_right
from localization_heads.lvlm.answers.trace import Trace
from localization_heads.lvlm.asking import attend_with_extras
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
from localization_heads.lvlm.loaded import LoadedModel
from localization_heads.lvlm.sharing import Answer, EncodedImage, apart
from localization_heads.lvlm.tracing import traced
from localization_heads.options.compose import newcomers_grounding
from localization_heads.options.groups import CriteriaOptions, GroundingOptions
from localization_heads.options.surroundings import TRACE_TOKENS, TraceOptions

log = logging.getLogger(__name__)

OWN_HEADS = 3
"""Heads that an image and a query pick where none are known (the paper's k)."""


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """Pairs of image and expression, made ready for the model in parts, each with the positions of its results."""

    parts: Sequence[tuple[Sequence[int], Answer]]

    def run(self, last_layer: int | None) -> list[AttentionMaps]:
        """The maps of all pairs, in the order in which they were given."""
        found: dict[int, AttentionMaps] = {}
        for places, answer in self.parts:
            found |= zip(places, answer(last_layer), strict=True)
        return [found[place] for place in sorted(found)]


class RecentImages:
    """Encoded images by content and settings; the least recently used is dropped first. Safe for several threads.

    Args:
        max_bytes: keys, values and pixels of all images together. An image that is larger by itself is encoded and
            answered, but not kept; 0 keeps none.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self._images: OrderedDict[tuple[object, ...], EncodedImage] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return self._sum()

    def get(self, key: tuple[object, ...], encode: Callable[[], EncodedImage]) -> EncodedImage:
        """The image of that key, encoded now if it is not there."""
        with self._lock:
            found = self._images.get(key)
            if found is not None:
                self._images.move_to_end(key)
                return found
        image = encode()  # not under the lock: other images need not wait
        with self._lock:
            return self._images.setdefault(key, image)

    def shrink(self) -> None:
        """Drop images until the rest fits. Called after each use: a request for deeper layers makes an image grow."""
        with self._lock:
            while self._images and self._sum() > self.max_bytes:
                self._images.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._images.clear()

    def _sum(self) -> int:
        return sum(image.num_bytes for image in self._images.values())


def content(shown: PromptImages) -> bytes:
    """A digest of the pixels that are shown, 32 bytes."""
    digest = hashlib.sha256()
    for image in images_of(shown):
        digest.update(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    return digest.digest()


def _by_image(images: Sequence[PromptImages]) -> list[list[int]]:
    """The places of each image, which is told by its identity, in the order in which they come."""
    places: dict[int, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(id(image), []).append(place)
    return list(places.values())


class LVLM(LoadedModel):
    """A vision-language model that returns the attention maps of its heads. Made by `load_model`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.recent = RecentImages()

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
            extra_prompts: what else is asked about the image: other expressions, and how sure the model is.
            siblings: the other expressions of the image; without any, the model lists what it sees.

        Raises:
            NotFiniteError: NaN or infinite attention, as where half precision overflows.
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
            prepared: what `prepare` made of the same pairs, where `can_prepare`.
            extra_prompts: as of `attend`. All that is asked about one image goes on from its encoding, image by image.
            siblings: for each pair, the other expressions of its image.
        """
        if self.can_prepare(extra_prompts):
            return (prepared or self.prepare(images, expressions)).run(last_layer)
        given = siblings or [()] * len(images)
        found: dict[int, AttentionMaps] = {}
        for places in _by_image(images):
            encoded = EncodedImage(self, images[places[0]])
            texts, others = [expressions[place] for place in places], [given[place] for place in places]
            found |= zip(
                places, attend_with_extras(encoded, texts, others, extra_prompts, last_layer), strict=True
            )
        return [found[place] for place in sorted(found)]

    def attend_mirrored(
        self, image: Image.Image, expression: str, maps: AttentionMaps
    ) -> NDArray[np.float32] | None:
        """The maps of the mirrored image with left and right swapped in the expression, for the sensitivity.

        Args:
            maps: those of the image itself.

        Returns:
            As the model gives them; None where they cannot be compared with `maps`, or it cannot take the image.
        """
        try:
            found = self.attend(ImageOps.mirror(image), swap_left_right(expression))
        except (NotFiniteError, OutOfMemoryError) as error:
            log.warning("%r: the mirrored image could not be asked: %s", expression, error)
            return None
        return found.attention if covers_mirrored_region(maps, found) else None

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
            frames: RGB images of one size, in their order. Where the family merges frames, these have the same map.
            times: of the frames, in seconds; None takes two frames a second.

        Raises:
            UsageError: the family has no video tokens that are read here.
        """
        return attend_clip(self, frames, expression, times, last_layer)

    def can_prepare(self, extra_prompts: ExtraPrompts = NO_EXTRA_PROMPTS) -> bool:
        """Whether each pair is one question, so that `prepare` can do the host's share of it ahead."""
        return not extra_prompts and not self.paraphrases

    def prepare(self, images: Sequence[PromptImages], expressions: Sequence[str]) -> PreparedBatch:
        """The host's share of `attend_batch`, which may run ahead of the model in another thread."""
        parts: list[tuple[Sequence[int], Answer]] = []
        alone: list[int] = []
        batched = not family_of(self.model.config).one_image_per_batch
        for places in _by_image(images):
            single = batched and (len(places) == 1 or self.why_not_shared)
            if single and isinstance(images[places[0]], Image.Image):
                alone += places
                continue
            encoded = EncodedImage(self, images[places[0]])
            questions = [encoded.question(expressions[place]) for place in places]
            parts.append((places, partial(encoded.answer, questions)))
        if alone:
            pairs = [images[place] for place in alone], [expressions[place] for place in alone]
            parts.append((alone, apart(self, *pairs)))
        return PreparedBatch(parts)

    def trace(
        self,
        image: Image.Image,
        query: str,
        heads: Sequence[Head] | None = None,
        *,
        max_new_tokens: int = TRACE_TOKENS,
        trace: TraceOptions | None = None,
        options: GroundingOptions | None = None,
    ) -> Trace:
        """Where heads look while the model writes each word of its answer to a query, greedily.

        Args:
            image: RGB image of any size.
            heads: whose maps are kept; None takes the known heads, as far as they were found with this prompt and query
                token, and if there are none, the three that this image and query pick.
            max_new_tokens: length of the longest answer, in tokens.
            trace: which step belongs to a word, and what is kept of it.
            options: how maps become boxes; by default as in `ground`. Maps of other expressions are not asked for.

        Raises:
            UsageError: a query that cannot be used, several images, or a head that the model does not have.
            NotFiniteError: NaN or infinite attention.
        """
        image = image_at(image, None)
        chosen = tuple(
            Head(*head) for head in heads or self.heads_auto() or self.pick_own_heads(image, query)
        )
        return traced(
            self,
            image,
            query,
            chosen,
            max_new_tokens=max_new_tokens,
            options=trace or TraceOptions(),
            grounding=options or newcomers_grounding(),
        )

    def pick_own_heads(
        self, image: Image.Image, query: str, criteria: CriteriaOptions | None = None, k: int = OWN_HEADS
    ) -> list[Head]:
        """The heads that this very image and query pick. NoHeadError where none passes the criteria."""
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
        """`encode_image(image).attend(expressions)`, for conversations: the most recent images stay encoded.

        They are recognised by their pixels and dropped once `recent.max_bytes` are used. Siblings of each expression
        are the others. NotFiniteError as for `attend`.
        """
        asked = (self.conv_mode, self.system, self.query_token, self.view, self.dropped_token)
        key = (content(image), *asked, self.answer_tokens, self.answer_span, self.paraphrases)
        try:
            encoded = self.recent.get(key, lambda: EncodedImage(self, image))
            found = attend_with_extras(
                encoded, expressions, [expressions] * len(expressions), extra_prompts, last_layer
            )
            for maps in found:
                maps.check_finite()
            return found
        finally:
            self.recent.shrink()

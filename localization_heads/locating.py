"""`ground` and `ground_all`: boxes and masks from Python, without files and options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, Unpack, overload

from localization_heads.arguments import Heads, K, Masks, ReadOut, calibrated, grounder_of
from localization_heads.attention import AttentionMaps, Box
from localization_heads.data.images import ImageSource
from localization_heads.data.phrases import split_phrases
from localization_heads.data.samples import Sample
from localization_heads.data.sources import PromptImages, Together, as_sources, image_at, load_prompt_images
from localization_heads.errors import ArgumentError, check_choice, shown
from localization_heads.finding import AT_ONCE
from localization_heads.grounder import Grounder
from localization_heads.grounding.boxes import crop_around, mapped_back
from localization_heads.grounding.confidence import Calibration
from localization_heads.grounding.ground import LEAST_OF_PLACES, ground_maps
from localization_heads.located import Located
from localization_heads.lvlm.vocabulary import singularize_unknown_words, warn_of_unknown_words
from localization_heads.options.groups import CriteriaOptions
from localization_heads.options.parts import PLACES, ImageBoxes, InstancesBy
from localization_heads.segmentation.segmenter import GRABCUT, Proposer

if TYPE_CHECKING:
    from localization_heads.data.sources import AnyImage
    from localization_heads.lvlm.model import LVLM

    OneImage = AnyImage | Together
    Texts = list[str] | tuple[str, ...]


class How(TypedDict, total=False):
    """The other arguments of `ground`."""

    options: ReadOut
    segmenter: Masks
    k: int
    zoom: bool
    image_boxes: ImageBoxes
    calibration: Calibration | str | Path | None
    abstain: float | None


@overload
def ground(
    lvlm: LVLM, image: OneImage, expression: str, heads: Heads = ..., **how: Unpack[How]
) -> Located: ...
@overload
def ground(
    lvlm: LVLM, image: OneImage, expression: Texts, heads: Heads = ..., **how: Unpack[How]
) -> list[Located]: ...
@overload
def ground(
    lvlm: LVLM,
    image: list[OneImage] | tuple[OneImage, ...],
    expression: str | Texts,
    heads: Heads = ...,
    **how: Unpack[How],
) -> list[Located]: ...
def ground(
    lvlm: LVLM,
    image: Any,
    expression: str | Sequence[str],
    heads: Heads = None,
    *,
    options: ReadOut = None,
    segmenter: Masks = GRABCUT,
    k: int = K,
    zoom: bool = False,
    image_boxes: ImageBoxes = "one",
    calibration: Calibration | str | Path | None = None,
    abstain: float | None = None,
) -> Any:
    """The box, mask and heat map of an expression in an image (Sec. 5); or a list, of several.

    The prefix that holds the image is kept: asked about the same image again, the model does not encode it anew.
    Images in a list go through the model in batches.

    Args:
        image: a path, an http(s) address (an `Address` may allow private ones), a PIL image, an array, a tensor, bytes
            or an open file (`data.sources`); several that one prompt shows, `Together([a, b])`; or a list of these,
            each of which is asked about by itself.
        expression: a text; a list of texts, for one image or one for each; or several in one text, as in "the dog; the
            cat". Then the result is a list, in the same order (which type checkers cannot see coming of a ";").
        heads: whose maps are added: a list such as `["L14H24", (14, 13)]`, the path of a heads.json, a ranking, of
            which the best are taken, with a note in `lvlm.notes` if it was made with other weights, another prompt or
            query token; None takes the model's known localization heads, and if there are none, those that each image
            and expression pick (the paper's "greedy" ablation), as "greedy" does.
        options: the read-out: a `GroundingOptions`, a preset such as "paper", or some options by name,
            `{"means": 2.0}`.
        segmenter: what makes the mask: GrabCut by default, None for the map's own pseudo-mask; a preset such as "sam2"
            is loaded at each call, one of `make_segmenter` only once.
        k: how many heads.
        zoom: ask again about a crop around the box, and average both boxes where they agree (`grounding.boxes`).
        image_boxes: of images together, a box in the one that draws most of the heads' attention, or in each.
        calibration: what makes the confidence a probability: a `calibration.json` of stage=calibrate; None leaves the
            raw signal.
        abstain: the least probability of presence (of a calibration without it, the least confidence) of what is
            there: below it, the result is `absent`. None takes everything for present.

    Raises:
        ArgumentError: a head that the model does not have, an empty list, lists of different lengths, or `abstain`
            without a calibration.
        UsageError: an image or an expression that cannot be used, or one that no head passes the criteria for; a
            calibration of other heads or another recipe. Both are `UsageError`.
        NotFiniteError: NaN or infinite attention.
    """
    check_choice("image_boxes", image_boxes, ImageBoxes)
    pairs, single = _pairs(image, expression)
    grounder = grounder_of(lvlm, heads, CriteriaOptions(), options, segmenter, k)
    grounder = calibrated(grounder, lvlm, calibration, abstain, zoom=zoom)
    grounder = replace(grounder, each_image=image_boxes == "each")
    if zoom and any(isinstance(pair.source, Together) for pair in pairs):
        raise ArgumentError("zoom=True looks again at one image, and a prompt shows several: leave it out")
    warn_of_unknown_words(lvlm, [pair.expression for pair in pairs])
    found = []
    for one in _asked(lvlm, grounder, pairs):
        second = _second_look(lvlm, grounder, one) if zoom else None
        grounding = grounder.ground(one.maps, one.image, second=second)
        name = one.pair.name(grounding.image_index)
        found.append(Located.of(grounding, one.image, one.pair.expression, name))
    return found[0] if single else found


class _Pair(NamedTuple):
    """An image, not yet opened, and an expression; `siblings` are all expressions of that image."""

    source: ImageSource | Together
    expression: str
    siblings: Sequence[str]

    def name(self, index: int | None) -> str:
        """Of the image at that place of the prompt."""
        return Sample(self.source, self.expression).at(index).image_file


class _Asked(NamedTuple):
    pair: _Pair
    image: PromptImages
    maps: AttentionMaps


def _pairs(image: Any, expression: Any) -> tuple[list[_Pair], bool]:
    """Every image with every expression that is asked about it, and whether that is a single one."""
    if not isinstance(image, list | tuple):
        texts = _texts(expression)
        return [_Pair(as_sources(image), text, texts) for text in texts], isinstance(expression, str) and len(
            texts
        ) == 1
    if not image:
        raise ArgumentError("image=[] names no image")
    each = [expression] * len(image) if isinstance(expression, str) else list(expression)
    if len(each) != len(image):
        raise ArgumentError(
            f"{len(image)} images and {len(each)} expressions: give one for all, or one for each image"
        )
    texts_of = [_texts(one) for one in each]
    return [
        _Pair(as_sources(one), text, texts)
        for one, texts in zip(image, texts_of, strict=True)
        for text in texts
    ], False


def _texts(expression: Any) -> list[str]:
    """The expressions of one image. ArgumentError for what is no text."""
    every = [expression] if isinstance(expression, str) else expression
    if not isinstance(every, list | tuple) or not all(isinstance(one, str) for one in every):
        raise ArgumentError(f"expression={shown(expression)}: give a text, or a list of texts")
    if not every:
        raise ArgumentError("expression=[] names nothing to look for")
    return [phrase for one in every for phrase in split_phrases(one, "split", "")]


def _asked(lvlm: LVLM, grounder: Grounder, pairs: Sequence[_Pair]) -> Iterator[_Asked]:
    """The maps of every pair, in order, `AT_ONCE` at a time; an image that follows itself is opened once."""
    last_layer, extra_prompts = grounder.last_layer, grounder.extra_prompts()
    if len({id(pair.source) for pair in pairs}) == 1:
        image, rest = load_prompt_images(pairs[0].source), iter(pairs)
        while part := list(islice(rest, AT_ONCE)):
            every = lvlm.ask(
                image, [pair.expression for pair in part], last_layer=last_layer, extra_prompts=extra_prompts
            )
            yield from (_Asked(pair, image, maps) for pair, maps in zip(part, every, strict=True))
        return
    waiting = iter(pairs)
    while batch := list(islice(waiting, AT_ONCE)):
        images = _opened(batch)
        found = lvlm.attend_batch(
            images,
            [pair.expression for pair in batch],
            last_layer=last_layer,
            extra_prompts=extra_prompts,
            siblings=[pair.siblings for pair in batch],
        )
        for pair, image, maps in zip(batch, images, found, strict=True):
            maps.check_finite()
            yield _Asked(pair, image, maps)


def _opened(pairs: Sequence[_Pair]) -> list[PromptImages]:
    """The image of each pair; one that comes several times is the same object, so that it is encoded once."""
    images: dict[int, PromptImages] = {}
    for pair in pairs:
        if id(pair.source) not in images:
            images[id(pair.source)] = load_prompt_images(pair.source)
    return [images[id(pair.source)] for pair in pairs]


def _second_look(lvlm: LVLM, grounder: Grounder, asked: _Asked) -> Box | None:
    """The box that the same heads find in a crop around the first one, in its pixels; None if none is asked."""
    first = ground_maps(asked.maps, grounder.heads_of(asked.maps), grounder.options)
    if (crop := crop_around(first)) is None:
        return None
    last_layer = max(head.layer for head in first.heads)
    image = image_at(asked.image, None).crop(crop)
    closer = lvlm.attend(image, asked.pair.expression, last_layer=last_layer)
    found = ground_maps(closer, first.heads, grounder.options)
    return mapped_back(found.box, crop) if found.cells.any() else None


def ground_all(
    lvlm: LVLM,
    image: AnyImage | Together,
    expression: str,
    heads: Heads = None,
    *,
    options: ReadOut = None,
    segmenter: Masks = GRABCUT,
    k: int = K,
    by: InstancesBy = "components",
    calibration: Calibration | str | Path | None = None,
    abstain: float | None = None,
) -> list[Located]:
    """Every object that an expression such as "the dogs" fits, that of the highest score first; at least one.

    Each is a component of the map's positive cells that holds at least `LEAST_MASS` of the strongest one's attention,
    with a box, a mask and a score of its own (the share of the whole map in its box); of two that overlap by more than
    half only the better one is there. Each is `absent` by itself. A plural that the model does not know is asked in the
    singular. Arguments and errors as of `ground`.

    Args:
        by: whether the map is that of the expression (`components`) or the mean of those of the expression on the left,
            on the right, at the top and at the bottom (`places`), of which an object draws `LEAST_OF_PLACES` or more;
            or whether the segmenter proposes objects, of which the expression's map chooses (`segmenter`).
    """
    check_choice("by", by, InstancesBy)
    source = as_sources(image)
    texts = _texts(expression)
    if len(texts) != 1:
        raise ArgumentError(f"expression={shown(expression)}: give one text; ground takes several")
    (asked,) = texts
    grounder = grounder_of(lvlm, heads, CriteriaOptions(), options, segmenter, k)
    if by == "places":
        lvlm = lvlm.with_paraphrases(PLACES)
    asked = singularize_unknown_words(lvlm.processor.tokenizer, asked)
    opened = load_prompt_images(source)
    grounder = calibrated(grounder, lvlm, calibration, abstain)
    if by == "places":
        grounder = replace(grounder, least_mass=LEAST_OF_PLACES)
    elif by == "segmenter":
        if not isinstance(grounder.segmenter, Proposer):
            raise ArgumentError(
                "by=segmenter: give a segmenter that can propose objects, such as grabcut or a SAM"
            )
        grounder = replace(grounder, proposes=True)
    warn_of_unknown_words(lvlm, [asked])
    (maps,) = lvlm.ask(
        opened, [asked], last_layer=grounder.last_layer, extra_prompts=grounder.extra_prompts()
    )
    pair = _Pair(source, asked, texts)
    found = grounder.ground_all(maps, opened)
    return [Located.of(one, opened, asked, pair.name(one.image_index)) for one in found]

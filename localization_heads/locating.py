"""`ground` and `ground_all`: boxes, masks and heat maps from Python."""

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
from localization_heads.finding import BATCH_SIZE
from localization_heads.grounder import Grounder
from localization_heads.grounding.boxes import crop_around, to_image_pixels
from localization_heads.grounding.confidence import Calibration
from localization_heads.grounding.ground import MIN_INSTANCE_MASS_OF_PLACES, ground_maps
from localization_heads.located import Located
from localization_heads.lvlm.vocabulary import singularize_unknown_words, warn_of_unknown_words
from localization_heads.options.finder_mixins import PLACE_PARAPHRASES, ImageBoxes, InstancesBy
from localization_heads.options.groups import CriteriaOptions
from localization_heads.segmentation.segmenter import GRABCUT, Proposer

if TYPE_CHECKING:
    from localization_heads.data.sources import AnyImage
    from localization_heads.lvlm.model import LVLM

    OneImage = AnyImage | Together
    Texts = list[str] | tuple[str, ...]


class GroundArguments(TypedDict, total=False):
    """The keyword arguments of `ground`."""

    options: ReadOut
    segmenter: Masks
    k: int
    zoom: bool
    image_boxes: ImageBoxes
    calibration: Calibration | str | Path | None
    abstain: float | None


@overload
def ground(
    lvlm: LVLM, image: OneImage, expression: str, heads: Heads = ..., **how: Unpack[GroundArguments]
) -> Located: ...
@overload
def ground(
    lvlm: LVLM, image: OneImage, expression: Texts, heads: Heads = ..., **how: Unpack[GroundArguments]
) -> list[Located]: ...
@overload
def ground(
    lvlm: LVLM,
    image: list[OneImage] | tuple[OneImage, ...],
    expression: str | Texts,
    heads: Heads = ...,
    **how: Unpack[GroundArguments],
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
    """Ground an expression in an image: its box, mask and heat map (Sec. 5). Returns a list for several of either.

    The KV cache of the image's prefix is kept, so that further expressions of the same image do not encode it again.
    A list of images goes through the model in batches.

    Args:
        image: a path, an http(s) address (an `Address` may allow private ones), a PIL image, an array, a tensor, bytes
            or an open file (`data.sources`); `Together([a, b])` for several images in one prompt; or a list of these,
            each in a prompt of its own.
        expression: a text; a list of texts, all for one image or one per image; or several texts joined by semicolons,
            "the dog; the cat". Several return a list in the same order (which type checkers cannot infer from a ";").
        heads: the heads whose maps are added: a list such as `["L14H24", (14, 13)]`, the path of a heads.json, or a
            ranking, whose best `k` are used, with a note in `lvlm.notes` if it was made with other weights, another
            prompt or another query token. None uses the model's known localization heads; if there are none, each
            sample selects its own (the paper's "greedy" ablation), as with "greedy".
        options: the read-out: a `GroundingOptions`, a preset such as "paper", or a mapping of options to override,
            `{"means": 2.0}`.
        segmenter: what makes the mask: GrabCut by default; None for the map's pseudo-mask. A preset such as "sam2" is
            loaded at every call; one from `make_segmenter` is loaded once.
        k: number of heads.
        zoom: attend again to a crop around the box and average both boxes if they agree (`grounding.boxes`).
        image_boxes: for images together: one box, in the image with most of the heads' attention, or one in each.
        calibration: a `calibration.json` of stage=calibrate, which turns the confidence into a probability; None keeps
            the raw signal.
        abstain: threshold on the probability of presence (on the confidence, if the calibration has no presence model):
            below it the result is `absent`. None never abstains.

    Raises:
        ArgumentError: a head that the model does not have, an empty list, lists of different lengths, or `abstain`
            without a calibration. It is a `UsageError`.
        UsageError: an unusable image or expression, or one for which no head passes the criteria; a calibration of
            other heads or another recipe.
        NotFiniteError: NaN or infinite attention.
    """
    check_choice("image_boxes", image_boxes, ImageBoxes)
    pairs, single = _pairs(image, expression)
    grounder = grounder_of(lvlm, heads, CriteriaOptions(), options, segmenter, k)
    grounder = calibrated(grounder, lvlm, calibration, abstain, zoom=zoom)
    grounder = replace(grounder, each_image=image_boxes == "each")
    if zoom and any(isinstance(pair.source, Together) for pair in pairs):
        raise ArgumentError("zoom=True crops a single image, but this prompt has several: leave it out")
    warn_of_unknown_words(lvlm, [pair.expression for pair in pairs])
    results = []
    for pair, image, maps in _attend_pairs(lvlm, grounder, pairs):
        second = _second_box(lvlm, grounder, pair.expression, image, maps) if zoom else None
        grounding = grounder.ground(maps, image, second=second)
        name = pair.image_name(grounding.image_index)
        results.append(Located.of(grounding, image, pair.expression, name))
    return results[0] if single else results


class _Pair(NamedTuple):
    """An image, not yet decoded, with an expression; `siblings` are all expressions of that image."""

    source: ImageSource | Together
    expression: str
    siblings: Sequence[str]

    def image_name(self, index: int | None) -> str:
        """The file or address of the image at `index` in the prompt."""
        return Sample(self.source, self.expression).at(index).image_file


def _pairs(image: Any, expression: Any) -> tuple[list[_Pair], bool]:
    """Every image with each of its expressions, and whether `ground` returns a single result instead of a list."""
    if not isinstance(image, list | tuple):
        texts = _split_texts(expression)
        single = isinstance(expression, str) and len(texts) == 1
        return [_Pair(as_sources(image), text, texts) for text in texts], single
    if not image:
        raise ArgumentError("image=[] names no image")
    expressions = [expression] * len(image) if isinstance(expression, str) else list(expression)
    if len(expressions) != len(image):
        raise ArgumentError(
            f"{len(image)} images and {len(expressions)} expressions: give one for all, or one for each image"
        )
    texts_by_image = [_split_texts(expression) for expression in expressions]
    pairs = [
        _Pair(as_sources(source), text, texts)
        for source, texts in zip(image, texts_by_image, strict=True)
        for text in texts
    ]
    return pairs, False


def _split_texts(expression: Any) -> list[str]:
    """The expressions of one image, split at semicolons. ArgumentError if one is not a text, or there are none."""
    texts = [expression] if isinstance(expression, str) else expression
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ArgumentError(f"expression={shown(expression)}: give a text, or a list of texts")
    if not texts:
        raise ArgumentError("expression=[] names nothing to look for")
    return [phrase for text in texts for phrase in split_phrases(text, "split", "")]


def _attend_pairs(
    lvlm: LVLM, grounder: Grounder, pairs: Sequence[_Pair]
) -> Iterator[tuple[_Pair, PromptImages, AttentionMaps]]:
    """Yield each pair with its decoded image and maps, in order; the model runs on `BATCH_SIZE` pairs at a time."""
    last_layer, extra_prompts = grounder.last_layer, grounder.extra_prompts()
    remaining = iter(pairs)
    if len({id(pair.source) for pair in pairs}) == 1:
        image = load_prompt_images(pairs[0].source)
        while batch := list(islice(remaining, BATCH_SIZE)):
            texts = [pair.expression for pair in batch]
            every_maps = lvlm.ask(image, texts, last_layer=last_layer, extra_prompts=extra_prompts)
            yield from ((pair, image, maps) for pair, maps in zip(batch, every_maps, strict=True))
        return
    while batch := list(islice(remaining, BATCH_SIZE)):
        images = _load_images(batch)
        every_maps = lvlm.attend_batch(
            images,
            [pair.expression for pair in batch],
            last_layer=last_layer,
            extra_prompts=extra_prompts,
            siblings=[pair.siblings for pair in batch],
        )
        for pair, image, maps in zip(batch, images, every_maps, strict=True):
            maps.check_finite()
            yield pair, image, maps


def _load_images(pairs: Sequence[_Pair]) -> list[PromptImages]:
    """The image of each pair; pairs of one source share one object, so that the model encodes it once."""
    images: dict[int, PromptImages] = {}
    for pair in pairs:
        if id(pair.source) not in images:
            images[id(pair.source)] = load_prompt_images(pair.source)
    return [images[id(pair.source)] for pair in pairs]


def _second_box(
    lvlm: LVLM, grounder: Grounder, expression: str, image: PromptImages, maps: AttentionMaps
) -> Box | None:
    """The box that the same heads give in a crop around the first box, in pixels of the whole image.

    None if the first box needs no crop, or if the crop's map has no positive cell.
    """
    first = ground_maps(maps, grounder.heads_of(maps), grounder.options)
    if (crop := crop_around(first)) is None:
        return None
    last_layer = max(head.layer for head in first.heads)
    crop_maps = lvlm.attend(image_at(image, None).crop(crop), expression, last_layer=last_layer)
    second = ground_maps(crop_maps, first.heads, grounder.options)
    return to_image_pixels(second.box, crop) if second.cells.any() else None


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
    """Ground every object that an expression such as "the dogs" refers to, highest score first; at least one.

    Each object is a component of the map's positive cells with at least `MIN_INSTANCE_MASS` of the strongest
    component's attention, and has its own box, mask, score (the share of the whole map in its box) and `absent` flag.
    Of two that overlap by more than half, the better one is kept. A plural that is not in the model's vocabulary is
    replaced by its singular. Other arguments and errors are those of `ground`.

    Args:
        by: where the objects come from. `components`: the components of the expression's map. `places`: those of the
            mean of four maps, of the expression on the left, on the right, at the top and at the bottom; a component
            needs only `MIN_INSTANCE_MASS_OF_PLACES` there. `segmenter`: the segmenter's proposals, filtered by the map.
    """
    check_choice("by", by, InstancesBy)
    source = as_sources(image)
    texts = _split_texts(expression)
    if len(texts) != 1:
        raise ArgumentError(f"expression={shown(expression)}: give one text; ground takes several")
    grounder = grounder_of(lvlm, heads, CriteriaOptions(), options, segmenter, k)
    if by == "places":
        lvlm = lvlm.with_paraphrases(PLACE_PARAPHRASES)
    text = singularize_unknown_words(lvlm.processor.tokenizer, texts[0])
    image = load_prompt_images(source)
    grounder = calibrated(grounder, lvlm, calibration, abstain)
    if by == "places":
        grounder = replace(grounder, least_mass=MIN_INSTANCE_MASS_OF_PLACES)
    elif by == "segmenter":
        if not isinstance(grounder.segmenter, Proposer):
            raise ArgumentError("by=segmenter: give a segmenter that can propose objects, such as grabcut or a SAM")
        grounder = replace(grounder, proposes=True)
    warn_of_unknown_words(lvlm, [text])
    (maps,) = lvlm.ask(image, [text], last_layer=grounder.last_layer, extra_prompts=grounder.extra_prompts())
    pair = _Pair(source, text, texts)
    groundings = grounder.ground_all(maps, image)
    return [Located.of(one, image, text, pair.image_name(one.image_index)) for one in groundings]

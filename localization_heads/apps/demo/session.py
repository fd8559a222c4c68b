"""A question to the page: an image, its expressions and their attention maps.

The model runs only in `ask`, one forward pass at a time. A slider or a click only calls `ImageQuestion.ground` again,
on the stored maps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localization_heads.attention import AttentionMaps
from localization_heads.data.address import ImageError
from localization_heads.data.images import load_image, open_raster
from localization_heads.data.masks import encode_mask
from localization_heads.errors import UsageError, shown
from localization_heads.grounder import Grounder
from localization_heads.grounding.confidence import Calibration
from localization_heads.grounding.ground import Grounding
from localization_heads.heads.criteria import head_statistics
from localization_heads.heads.head import Head, check_heads
from localization_heads.heads.one_sample import greedy_heads
from localization_heads.lvlm.checkpoints.sources import checkpoint_folder
from localization_heads.options.compose import choices_of, describe_preset, load_preset
from localization_heads.options.groups import CriteriaOptions, GroundingOptions, SegmenterOptions
from localization_heads.scenes.scene import VALIDATION_SEEDS, scene_samples
from localization_heads.segmentation.segmenter import Segmenter
from localization_heads.stages.run import DemoRun

MAX_QUESTIONS = 24
MAX_IMAGE_BYTES = 384 << 20
MAX_EXPRESSIONS = 6
MAX_EXPRESSION_LENGTH = 300  # characters
MAX_HEAD_LENGTH = 20
MAX_HEADS_LENGTH = 20_000
MAX_MEGAPIXELS = 32
MAX_SIDE = 2048  # pixels of the longest side of a stored image

P = ParamSpec("P")
T = TypeVar("T")


class ModelQueue:
    """Runs one task at a time on the model, in the order of submission.

    The expressions of a question are separate tasks, so that visitors take turns.

    Args:
        max_questions: questions in progress at once; each waits in a thread of the page.
        max_bytes: total size of their decoded images. A single question may exceed it, and a small image may overtake a
            large one that waits.
    """

    def __init__(self, max_questions: int = MAX_QUESTIONS, max_bytes: int = MAX_IMAGE_BYTES) -> None:
        self.max_questions, self.max_bytes = max_questions, max_bytes
        self._worker = ThreadPoolExecutor(1, "model")
        self._changed = threading.Condition()
        self._num_questions = self._reserved = 0

    @contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Wait for memory for a question's image. UsageError if too many questions are in progress."""
        with self._changed:
            if self._num_questions >= self.max_questions:
                raise UsageError("too many visitors are asking at this moment: try again soon")
            self._num_questions += 1
            self._changed.wait_for(lambda: not self._reserved or self._reserved + num_bytes <= self.max_bytes)
            self._reserved += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._num_questions -= 1
                self._reserved -= num_bytes
                self._changed.notify_all()

    def run(self, task: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Queue a task, wait for it, and return its result or raise its exception."""
        return self._worker.submit(task, *arguments, **options).result()


MODEL_QUEUE = ModelQueue()


class Segmenters:
    """The segmenters that a visitor can select: the presets of `segmenter=`, and the one the page was started with.

    The latter stays loaded, and so does the last one used of the others. They are loaded from this machine only: a
    click never downloads weights.
    """

    def __init__(self, run: DemoRun) -> None:
        self.run = run
        self.default = describe_preset("segmenter", run.options.segmenter)
        self.names = list(dict.fromkeys([self.default, *choices_of("segmenter")]))
        self._loaded: tuple[str, Segmenter | None] = self.default, run.segmenter

    def refine(self, name: object, grounding: Grounding, image: Image.Image) -> Grounding:
        """The grounding with the mask of the segmenter of that name; raises as `load` does."""
        return replace(self.run.grounder(None), segmenter=self.load(name)).refine(grounding, image)

    def load(self, name: object) -> Segmenter | None:
        """The segmenter of that name, to be called through the model queue.

        Raises:
            UsageError: there is no such segmenter, or its weights are not on this machine.
        """
        if name not in self.names:
            raise UsageError(f"mask by: one of {', '.join(self.names)}, not {shown(name)}")
        if name == self.default:
            return self.run.segmenter
        if self._loaded[0] != name:
            self._loaded = str(name), self._load(str(name))
        return self._loaded[1]

    def _load(self, name: str) -> Segmenter | None:
        options = SegmenterOptions(**load_preset("segmenter", name))
        if options.name and checkpoint_folder(options.name) is None:
            raise UsageError(
                f"segmenter={name}: {options.name} is not on this machine; "
                "start the page with it once, which fetches it"
            )
        self._loaded = self.default, None  # frees the memory of the previous one
        return self.run.load_segmenter(options)


@dataclass(frozen=True, eq=False)
class ImageQuestion:
    """One image, the expressions asked about it, and the attention maps of every head.

    Args:
        image: the image with no side longer than `MAX_SIDE`.
        maps: one for each expression, with the size of the uploaded image, in whose pixels groundings are.
        ranked: every head that can be selected, best first; the slider k selects the first ones.
        sums: mean attention sum over the expressions, `[layer, head]`.
        asked: the model and the prompt settings, by name, on which a calibration depends.
        calibration: the calibration for the default heads and read-out; with others the confidence is uncalibrated.
    """

    image: Image.Image
    expressions: tuple[str, ...]
    maps: tuple[AttentionMaps, ...]
    ranked: tuple[Head, ...]
    sums: NDArray[np.floating]
    asked: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        layers, heads = self.sums.shape
        return layers, heads

    @property
    def num_bytes(self) -> int:
        """Size of the image and the maps in memory."""
        return 3 * self.image.width * self.image.height + sum(maps.num_bytes for maps in self.maps)

    def ground(self, heads: Sequence[Head], options: GroundingOptions) -> list[Grounding]:
        """Box, pseudo-mask and map of each expression. UsageError for no heads, or a head that does not exist."""
        if not heads:
            raise UsageError("switch at least one head on")
        check_heads(heads, *self.shape)
        grounder = Grounder(tuple(heads), CriteriaOptions(), options)
        if self.calibration and not self.calibration.differences(grounder.recipe(self.asked)):
            grounder = replace(grounder, calibration=self.calibration)
        return [grounder.ground(maps, None) for maps in self.maps]


def ask(run: DemoRun, image: Image.Image | Path | None, text: object) -> ImageQuestion:
    """Run the model on an image and on expressions, which are separated by line breaks or semicolons.

    Raises:
        UsageError: image or expressions are missing or invalid, or too many questions are in progress.
    """
    if image is None:
        raise UsageError("choose an image first")
    expressions = split_expressions(text)
    with MODEL_QUEUE.reserve(3 * num_pixels(image)):
        opened = MODEL_QUEUE.run(read_image, image)
        calibration = run.calibration_for(run.named_heads)
        extra_prompts = run.extra_prompts(run.named_heads, calibration, every_head=True)
        maps = tuple(
            MODEL_QUEUE.run(run.lvlm.attend, opened, expression, extra_prompts=extra_prompts, siblings=expressions)
            for expression in expressions
        )
        opened.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    statistics = [head_statistics(m.attention, run.options.criteria) for m in maps]
    run.check_named_heads()
    greedy = greedy_heads(statistics[0], run.options.criteria, statistics[0].attention_sum.size)
    ranked = tuple(dict.fromkeys([*(run.named_heads or ()), *greedy]))
    if not ranked:
        raise UsageError("no head looks at this image: none passes criterion 1")
    sums = np.mean([s.attention_sum for s in statistics], axis=0)
    asked = {**run.lvlm.choices, **run.lvlm.asked}
    return ImageQuestion(opened, expressions, maps, ranked, sums, asked, calibration)


def num_pixels(image: Image.Image | Path) -> int:
    """The number of pixels, from the image's header. UsageError if it is no image or too large for the page."""
    with image_errors(), open_raster(image) if isinstance(image, Path) else nullcontext(image) as opened:
        width, height = opened.size
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise UsageError(
            f"the image has {width} x {height} pixels: at most {MAX_MEGAPIXELS} megapixels, make it smaller"
        )
    return width * height


def read_image(image: Image.Image | Path) -> Image.Image:
    """Decode a visitor's image. UsageError if it cannot be used."""
    with image_errors():
        return load_image(image)


@contextmanager
def image_errors() -> Iterator[None]:
    """Turn an ImageError into a UsageError that does not contain the path on this machine."""
    try:
        yield
    except ImageError as error:
        raise UsageError(f"the image cannot be used: {error.reason}") from None


def split_expressions(text: object) -> tuple[str, ...]:
    """The distinct expressions in a text. UsageError if there is none, one is too long, or there are too many.

    >>> split_expressions("the dog; the cat\\n the dog ")
    ('the dog', 'the cat')
    """
    lines = check_text("expressions", text, MAX_EXPRESSIONS * (MAX_EXPRESSION_LENGTH + 1))
    parts = [" ".join(part.split()) for part in lines.replace(";", "\n").splitlines()]
    expressions = tuple(dict.fromkeys(part for part in parts if part))
    if not expressions:
        raise UsageError("type what to look for, such as: the dog")
    if len(expressions) > MAX_EXPRESSIONS:
        raise UsageError(f"at most {MAX_EXPRESSIONS} expressions at a time, not {len(expressions)}")
    return tuple(check_text("an expression", expression, MAX_EXPRESSION_LENGTH) for expression in expressions)


def check_text(name: str, text: object, limit: int) -> str:
    """Return the text of a field. UsageError if it is not a string, or longer than `limit` characters."""
    if not isinstance(text, str):
        raise UsageError(f"{name}: a text, not {shown(text)}")
    if len(text) > limit:
        raise UsageError(f"{name}: at most {limit:,} characters, not {len(text):,}")
    return text


def check_number(name: str, value: object, low: float, high: float) -> float:
    """Return the number of a slider. UsageError if it is not a number from `low` to `high`.

    >>> check_number("k", 3, 1, 10)
    3
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name}: a number from {low:g} to {high:g}, not {shown(value)}")
    return value


def parse_heads(text: object) -> list[Head]:
    """The distinct heads in a text such as `L2H0 L3H1` or `2-0, 3-1`. UsageError for anything else."""
    names = check_text("heads", text, MAX_HEADS_LENGTH).replace(",", " ").split()
    try:
        return list(dict.fromkeys(Head.parse(check_text("a head", name, MAX_HEAD_LENGTH)) for name in names))
    except ValueError as error:
        raise UsageError(str(error)) from None


def toggle(heads: Sequence[Head], head: Head) -> list[Head]:
    """The heads without `head` if it is one of them, else with it."""
    return [h for h in heads if h != head] if head in heads else [*heads, head]


def as_json(question: ImageQuestion, groundings: Sequence[Grounding]) -> list[dict[str, Any]]:
    """The content of the download: the keys of predictions.jsonl, with the expression."""
    return [
        {
            "expression": expression,
            "bbox": [round(float(x), 2) for x in grounding.box],
            "score": round(float(grounding.score), 4),
            "mask": encode_mask(grounding.mask),
            "heads": [[head.layer, head.head] for head in grounding.heads],
            "agreement": _rounded(grounding.agreement),
            "confidence": _rounded(grounding.confidence),
            "calibrated": grounding.calibrated,
            "present": _rounded(grounding.presence),
        }
        for expression, grounding in zip(question.expressions, groundings, strict=True)
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def confidence_cell(grounding: Grounding) -> str:
    """The confidence for the table, marked if it is uncalibrated."""
    if grounding.confidence is None:
        return "-"
    return f"{grounding.confidence:.2f}{'' if grounding.calibrated else ' (raw)'}"


def example_images(count: int = 6, size: int = 384) -> list[tuple[Image.Image, str]]:
    """Synthetic scenes, each with an expression; they need no file and no network."""
    return [
        (Image.fromarray(scene.image), expression.text)
        for scene, expression in scene_samples(count, size=size, seeds=VALIDATION_SEEDS)
    ]


def mean_title(options: GroundingOptions) -> str:
    """The label of `binarise=mean` with these options.

    >>> mean_title(GroundingOptions()), mean_title(GroundingOptions(means=1.5))
    ('mean (paper)', '1.5 means')
    """
    if options.means == 1:
        return "mean" if options.margin else "mean (paper)"
    return f"{options.means:g} means"

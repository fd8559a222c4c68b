"""The state behind the page: the image, the expressions, their attention maps and the heads that are on.

The model runs in `ask` alone, one piece of work at a time. Everything that a slider or a click changes is
`Asked.answers` again, on maps that are there already.
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
from localization_heads.head_choice import check_heads
from localization_heads.heads.criteria import head_statistics
from localization_heads.heads.head import Head
from localization_heads.heads.one_sample import greedy_heads
from localization_heads.lvlm.checkpoints.sources import checkpoint_folder
from localization_heads.options.compose import choices_of, describe_preset, load_preset
from localization_heads.options.groups import CriteriaOptions, GroundingOptions, SegmenterOptions
from localization_heads.scenes.scene import VALIDATION_SEEDS, scene_samples
from localization_heads.segmentation.segmenter import Segmenter
from localization_heads.stages.run import DemoRun

MAX_ASKING = 24
MAX_ASKED_BYTES = 384 << 20
MAX_EXPRESSIONS = 6
MAX_EXPRESSION = 300  # characters
MAX_HEAD_NAME = 20
MAX_HEADS_TEXT = 20_000
MAX_MEGAPIXELS = 32
KEPT = 2048  # pixels of the longest side of an image that is kept

P = ParamSpec("P")
T = TypeVar("T")


class Turns:
    """Turns at the model: one piece of work at a time, first come, first served; each piece queues anew.

    Args:
        places: questions at once; each waits in a thread of the page's.
        max_bytes: of their decoded images. One question has room in any case, and small images pass by large ones.
    """

    def __init__(self, places: int = MAX_ASKING, max_bytes: int = MAX_ASKED_BYTES) -> None:
        self.places, self.max_bytes = places, max_bytes
        self._worker = ThreadPoolExecutor(1, "model")
        self._changed = threading.Condition()
        self._asking = self._held = 0

    @contextmanager
    def room(self, num_bytes: int) -> Iterator[None]:
        """Room for one question with an image of so many bytes, waited for. UsageError if all places are taken."""
        with self._changed:
            if self._asking >= self.places:
                raise UsageError("too many visitors are asking at this moment: try again soon")
            self._asking += 1
            self._changed.wait_for(lambda: not self._held or self._held + num_bytes <= self.max_bytes)
            self._held += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._asking -= 1
                self._held -= num_bytes
                self._changed.notify_all()

    def take(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """The result of `work`, once its turn has come. Raises what it raises."""
        return self._worker.submit(work, *arguments, **options).result()


MODEL = Turns()


class Segmenters:
    """What a visitor may have the masks made by: the choices of `segmenter=`, and what the page was started with.

    That one stays loaded, and of the others the last. They are loaded from this machine alone: no click fetches
    gigabytes.
    """

    def __init__(self, run: DemoRun) -> None:
        self.run = run
        self.own = describe_preset("segmenter", run.options.segmenter)
        self.names = list(dict.fromkeys([self.own, *choices_of("segmenter")]))
        self._loaded: tuple[str, Segmenter | None] = self.own, run.segmenter

    def refine(self, name: object, grounding: Grounding, image: Image.Image) -> Grounding:
        """The grounding with that segmenter's mask; raises as `load`."""
        return replace(self.run.grounder(None), segmenter=self.load(name)).refine(grounding, image)

    def load(self, name: object) -> Segmenter | None:
        """The segmenter of that name; in a turn at the model. UsageError for a wrong name, and for one not here."""
        if name not in self.names:
            raise UsageError(f"mask by: one of {', '.join(self.names)}, not {shown(name)}")
        if name == self.own:
            return self.run.segmenter
        if self._loaded[0] != name:
            self._loaded = str(name), self._load(str(name))
        return self._loaded[1]

    def _load(self, name: str) -> Segmenter | None:
        chosen = SegmenterOptions(**load_preset("segmenter", name))
        if chosen.name and checkpoint_folder(chosen.name) is None:
            raise UsageError(
                f"segmenter={name}: {chosen.name} is not on this machine; start the page with it once, which fetches it"
            )
        self._loaded = self.own, None  # room for the next
        return self.run.load_segmenter(chosen)


@dataclass(frozen=True, eq=False)
class Asked:
    """One image, the expressions asked about it, and the attention maps of every head.

    Args:
        image: as the page shows it, no side longer than `KEPT`.
        maps: one for each expression. They know the size of the image that was sent, in whose pixels answers are.
        ranked: every head that could be chosen, the likeliest first: what the slider k counts down.
        sums: mean attention sum over the expressions, `[layer, head]`.
        asked: the model and how it was asked, by name, on which a calibration depends.
        calibration: of the heads and the read-out that the page begins with; other ones give a raw confidence.
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

    def answers(self, heads: Sequence[Head], options: GroundingOptions) -> list[Grounding]:
        """A box, a mask and a map for each expression. UsageError if no head is on, or one that is not there."""
        if not heads:
            raise UsageError("switch at least one head on")
        check_heads(heads, *self.shape)
        grounder = Grounder(tuple(heads), CriteriaOptions(), options)
        if self.calibration and not self.calibration.differences(grounder.recipe(self.asked)):
            grounder = replace(grounder, calibration=self.calibration)
        return [grounder.ground(maps, None) for maps in self.maps]


def ask(run: DemoRun, image: Image.Image | Path | None, text: object) -> Asked:
    """Run the model on an image and on expressions, one a line or with semicolons between.

    Others have their turns between two expressions.

    Raises:
        UsageError: there is no image, no expression, or one that cannot be used; or too many are asking.
    """
    if image is None:
        raise UsageError("choose an image first")
    expressions = split_expressions(text)
    with MODEL.room(3 * num_pixels(image)):
        opened = MODEL.take(read_image, image)
        calibration = run.calibration_for(run.named_heads)
        extra_prompts = run.extra_prompts(run.named_heads, calibration, every_head=True)
        maps = tuple(
            MODEL.take(run.lvlm.attend, opened, expression, extra_prompts=extra_prompts, siblings=expressions)
            for expression in expressions
        )
        opened.thumbnail((KEPT, KEPT), Image.Resampling.LANCZOS)
    statistics = [head_statistics(m.attention, run.options.criteria) for m in maps]
    run.check_named_heads()
    first = list(run.named_heads or ())
    others = greedy_heads(statistics[0], run.options.criteria, statistics[0].attention_sum.size)
    ranked = tuple(dict.fromkeys([*first, *others]))
    if not ranked:
        raise UsageError("no head looks at this image: none passes criterion 1")
    sums = np.mean([s.attention_sum for s in statistics], axis=0)
    asked = {**run.lvlm.choices, **run.lvlm.asked}
    return Asked(opened, expressions, maps, ranked, sums, asked, calibration)


def num_pixels(image: Image.Image | Path) -> int:
    """From the header. UsageError for what is no image, or one of more pixels than the page takes."""
    with about_the_image(), open_raster(image) if isinstance(image, Path) else nullcontext(image) as opened:
        width, height = opened.size
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise UsageError(
            f"the image has {width} x {height} pixels: at most {MAX_MEGAPIXELS} megapixels, make it smaller"
        )
    return width * height


def read_image(image: Image.Image | Path) -> Image.Image:
    """The pixels of a visitor's image. UsageError if it cannot be used."""
    with about_the_image():
        return load_image(image)


@contextmanager
def about_the_image() -> Iterator[None]:
    """Errors about the image leave out its path on this machine."""
    try:
        yield
    except ImageError as error:
        raise UsageError(f"the image cannot be used: {error.reason}") from None


def split_expressions(text: object) -> tuple[str, ...]:
    """The expressions in a text, each once. UsageError for none, a long one, or more than the page has colours for.

    >>> split_expressions("the dog; the cat\\n the dog ")
    ('the dog', 'the cat')
    """
    lines = bounded("expressions", text, MAX_EXPRESSIONS * (MAX_EXPRESSION + 1))
    parts = [" ".join(part.split()) for part in lines.replace(";", "\n").splitlines()]
    expressions = tuple(dict.fromkeys(part for part in parts if part))
    if not expressions:
        raise UsageError("type what to look for, such as: the dog")
    if len(expressions) > MAX_EXPRESSIONS:
        raise UsageError(f"at most {MAX_EXPRESSIONS} expressions at a time, not {len(expressions)}")
    return tuple(bounded("an expression", expression, MAX_EXPRESSION) for expression in expressions)


def bounded(name: str, text: object, limit: int) -> str:
    """The text of a field. UsageError if it is none, or longer than `limit` characters."""
    if not isinstance(text, str):
        raise UsageError(f"{name}: a text, not {shown(text)}")
    if len(text) > limit:
        raise UsageError(f"{name}: at most {limit:,} characters, not {len(text):,}")
    return text


def number(name: str, value: object, low: float, high: float) -> float:
    """The number of a slider. UsageError for what no slider can send.

    >>> number("k", 3, 1, 10)
    3
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name}: a number from {low:g} to {high:g}, not {shown(value)}")
    return value


def parse_heads(text: object) -> list[Head]:
    """Heads from `L2H0 L3H1` or `2-0, 3-1`, each once. UsageError for anything else."""
    names = bounded("heads", text, MAX_HEADS_TEXT).replace(",", " ").split()
    try:
        return list(dict.fromkeys(Head.parse(bounded("a head", name, MAX_HEAD_NAME)) for name in names))
    except ValueError as error:
        raise UsageError(str(error)) from None


def toggled(heads: Sequence[Head], head: Head) -> list[Head]:
    """The heads with that one switched."""
    return [h for h in heads if h != head] if head in heads else [*heads, head]


def as_json(asked: Asked, groundings: Sequence[Grounding]) -> list[dict[str, Any]]:
    """The content of the download: the keys of predictions.jsonl, with the expression."""
    return [
        {
            "expression": expression,
            "bbox": [round(float(x), 2) for x in found.box],
            "score": round(float(found.score), 4),
            "mask": encode_mask(found.mask),
            "heads": [[head.layer, head.head] for head in found.heads],
            "agreement": _rounded(found.agreement),
            "confidence": _rounded(found.confidence),
            "calibrated": found.calibrated,
            "present": _rounded(found.presence),
        }
        for expression, found in zip(asked.expressions, groundings, strict=True)
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def sure(found: Grounding) -> str:
    """The confidence in a cell of the table."""
    if found.confidence is None:
        return "-"
    return f"{found.confidence:.2f}{'' if found.calibrated else ' (raw)'}"


def example_images(count: int = 6, size: int = 384) -> list[tuple[Image.Image, str]]:
    """Synthetic scenes with an expression that fits; they need no file and no network."""
    return [
        (Image.fromarray(scene.image), expression.text)
        for scene, expression in scene_samples(count, size=size, seeds=VALIDATION_SEEDS)
    ]


def mean_title(options: GroundingOptions) -> str:
    """What `binarise=mean` is called with these options.

    >>> mean_title(GroundingOptions()), mean_title(GroundingOptions(means=1.5))
    ('mean (paper)', '1.5 means')
    """
    if options.means == 1:
        return "mean" if options.margin else "mean (paper)"
    return f"{options.means:g} means"

"""The gradio page: its components, and what each of them starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from localization_heads.apps.demo.drawing import draw_boxes, draw_grid, draw_heat, head_at, resized
from localization_heads.apps.demo.guard import make_room
from localization_heads.apps.demo.session import (
    MODEL,
    Asked,
    Segmenters,
    as_json,
    ask,
    example_images,
    mean_title,
    number,
    parse_heads,
    sure,
    toggled,
)
from localization_heads.apps.demo.tracing import Tracing
from localization_heads.apps.demo.visitors import Visitors
from localization_heads.errors import UsageError, WorkError, shown
from localization_heads.grounding.ground import Grounding
from localization_heads.heads.head import Head
from localization_heads.lvlm.vocabulary import unknown_words
from localization_heads.options.groups import GroundingOptions
from localization_heads.stages.run import DemoRun

ABOUT = """# Localization heads
**{model}**, {layers} layers x {heads} heads. A few of them look at what you name: those framed in the grid.
Choose an image, type an expression, press Ground (or Shift+Enter). The model runs once for a question; sliders and
clicks only redo the sum and the box."""
THRESHOLDS = {"mean": "mean", "otsu": "Otsu", "top_mass": "share of the attention"}


def shown_to_people(action: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of ours appear on the page as one sentence."""

    @wraps(action)
    def guarded(*arguments: Any) -> Any:
        try:
            return action(*arguments)
        except (UsageError, WorkError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return guarded


class Page:
    """The components by name, and the actions over them.

    The actions take what the browser sent as it is (`preprocess=False`): gradio would decode an image of any size and
    raise its own errors for a number that is none.
    """

    def __init__(self, run: DemoRun, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.answers = folder / "answers"
        self.own = frozenset[Path]()  # what the page itself put into its folder
        self.visitors = Visitors(self.answers, lambda entry: entry in self.own)
        self.segmenters = Segmenters(run)
        self.examples = _stored_examples(folder / "examples")

    def layout(self) -> None:
        """Left the question, right the answer, below the heads."""
        lvlm = self.run.lvlm
        gr.Markdown(ABOUT.format(model=lvlm.name, layers=lvlm.num_layers, heads=lvlm.num_heads))
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                self._question()
            with gr.Column(scale=7, min_width=320):
                self._answer()
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                self._settings()
            with gr.Column(scale=7, min_width=320):
                self._grid()
        self.tracing = Tracing(self.run, self.visitors, self.upload_of)
        self.tracing.layout()

    def _question(self) -> None:
        image, text = self.examples[0]
        self.image = gr.Image(image, label="Image", elem_id="image", height=330)
        name = "Expressions, one a line or with ; between"
        self.text = gr.Textbox(text, lines=2, max_lines=6, label=name, elem_id="expression")
        self.button = gr.Button("Ground", variant="primary", elem_id="ground")
        looks: dict[str, Any] = {"columns": 3, "height": 300, "allow_preview": False}
        self.gallery = gr.Gallery(self.examples, label="Examples", elem_id="examples", **looks)

    def _answer(self) -> None:
        with gr.Row():
            self.boxes = _image("**Box and mask**", "boxes")
            self.heat = _image("**Map**", "heat")
        with gr.Row(visible=False) as self.second:
            self.boxes_b = _image("**Box and mask**, set B", "boxes_b")
            self.heat_b = _image("**Map**, set B", "heat_b")
        self.table = gr.Dataframe(
            headers=["expression", "set", "box", "score", "confidence"],
            interactive=False,
            label="Boxes",
            wrap=True,
            column_widths=["30%", "11%", "26%", "14%", "19%"],  # all five fit on a phone
            elem_id="table",
        )
        with gr.Row():
            self.json_file = gr.DownloadButton("Download JSON", elem_id="download_json")
            self.image_file = gr.DownloadButton("Download image", elem_id="download_image")

    def _settings(self) -> None:
        grounding = self.run.options.grounding
        self.which = gr.Dropdown([], label="Map of", elem_id="which")
        self.k = gr.Slider(
            1,
            max(10, self.run.options.k),
            self.run.options.k,
            step=1,
            label="k: heads that are on",
            elem_id="k",
        )
        high, name = max(3, grounding.sigma), "sigma: smoothing, in cells"
        self.sigma = gr.Slider(0, high, grounding.sigma, step=0.1, label=name, elem_id="sigma")
        self.binarise = gr.Radio(
            [(title, name) for name, title in {**THRESHOLDS, "mean": mean_title(grounding)}.items()],
            value=grounding.binarise,
            label="Threshold: cells above",
            elem_id="binarise",
        )
        self.threshold = gr.Slider(
            0.05, 0.95, grounding.top_mass, step=0.05, label="that share", elem_id="threshold"
        )
        self.mask = gr.Radio(
            self.segmenters.names,
            value=self.segmenters.own,
            label="Mask by (none: the map's own)",
            elem_id="mask",
        )
        self.compare = gr.Checkbox(False, label="Compare with a second set of heads", elem_id="compare")

    def _grid(self) -> None:
        self.edits = gr.Radio(["A", "B"], value="A", label="Clicks switch heads of set", visible=False)
        self.grid = _image(
            "**Heads by attention sum.** A click switches one on (framed) or off; a dot: on in set B.",
            "grid",
            buttons=[],
        )
        self.heads = gr.Textbox(label="Heads that are on", elem_id="heads", placeholder="L2H0 L3H1")

    def wire(self, load: Callable[..., Any]) -> None:
        """Events. Only `asking` runs the model; `load` is the page's opening, which asks for the first example."""
        outputs = [self.boxes, self.heat, self.boxes_b, self.heat_b, self.table, self.grid]
        outputs += [self.json_file, self.image_file]
        settings = [
            self.heads,
            self.which,
            self.sigma,
            self.binarise,
            self.threshold,
            self.mask,
            self.compare,
        ]
        raw: dict[str, Any] = {"preprocess": False}
        redo: dict[str, Any] = {
            "fn": shown_to_people(self.redraw),
            "inputs": settings,
            "outputs": outputs,
            **raw,
        }
        asking: dict[str, Any] = {
            "fn": shown_to_people(self.ask),
            "inputs": [self.image, self.text, self.k],
            "outputs": [self.heads, self.which],
            **raw,
        }
        for event in (load, self.button.click, self.text.submit):
            event(**asking).success(**redo)
        choosing = self.gallery.select(shown_to_people(self.choose), None, [self.image, self.text], **raw)
        choosing.success(**asking).success(**redo)
        # Not `release`, which the keyboard never fires; of the steps of a drag only the last that waits is drawn.
        last: dict[str, Any] = {"trigger_mode": "always_last", **raw}
        picking = self.k.input(shown_to_people(self.best), self.k, self.heads, **last)
        picking.success(**redo)
        inputs = (self.sigma.input, self.binarise.input, self.mask.input, self.which.input)
        for event in (*inputs, self.heads.submit):
            event(**{**redo, **last})
        self.threshold.input(lambda: "top_mass", None, self.binarise, **last).then(**redo)
        self.compare.input(self.show_second, self.compare, [self.second, self.edits], **raw).then(**redo)
        switching = self.grid.select(
            shown_to_people(self.switch), [self.heads, self.edits], self.heads, **raw
        )
        switching.success(**redo)
        self.tracing.wire(self.image, self.heads, shown_to_people)

    def ask(self, request: gr.Request, image: object, text: object, k: object) -> tuple[Any, ...]:
        """Run the model; the first `k` heads are on, the next `k` are set B."""
        count, upload = self._count(k), self.upload_of(image)
        with self.visitors.turn(request.session_hash) as visitor:
            asked = visitor.asked = ask(self.run, upload, text)
            visitor.heads_b = list(asked.ranked[count : 2 * count]) or list(asked.ranked[:count])
            if upload:
                self.visitors.replace_upload(visitor, upload)
        if unknown := unknown_words(self.run.lvlm.processor.tokenizer, asked.expressions):
            gr.Warning(f"words that the model does not know: {', '.join(unknown)}")
        choices = gr.Dropdown(choices=list(asked.expressions), value=asked.expressions[0])
        return _names(asked.ranked[:count]), choices

    def best(self, request: gr.Request, k: object) -> str:
        count = self._count(k)
        with self.visitors.turn(request.session_hash) as visitor:
            return _names(visitor.answer.ranked[:count])

    def choose(self, event: gr.EventData) -> tuple[str, str]:
        """An example."""
        chosen = _place(event)
        if not isinstance(chosen, int) or not 0 <= chosen < len(self.examples):
            raise UsageError(f"there is no example {shown(chosen)}")
        return self.examples[chosen]

    def show_second(self, wanted: object) -> tuple[Any, ...]:
        return gr.Row(visible=bool(wanted)), gr.Radio(visible=bool(wanted))

    def switch(self, request: gr.Request, heads: object, edits: object, event: gr.EventData) -> str:
        """Switch the head that was clicked in the grid."""
        with self.visitors.turn(request.session_hash) as visitor:
            chosen = parse_heads(heads)
            head = clicked(_place(event), visitor.answer.shape)
            if head is not None and edits == "B":
                visitor.heads_b = toggled(visitor.heads_b, head)
            elif head is not None:
                chosen = toggled(chosen, head)
            return _names(chosen)

    def redraw(
        self,
        request: gr.Request,
        heads: object,
        which: object,
        sigma: object,
        binarise: object,
        share: object,
        mask: object,
        compare: object,
    ) -> tuple[Any, ...]:
        """Everything but the model: the sum, the box, the images, the files to download."""
        options = self._options(sigma, binarise, share)
        with self.visitors.turn(request.session_hash) as visitor:
            asked, mask = visitor.answer, self._usable(mask)
            sets = {"A": parse_heads(heads), **({"B": visitor.heads_b} if compare else {})}
            found = {
                name: [self._refined(asked, answer, mask) for answer in asked.answers(chosen, options)]
                for name, chosen in sets.items()
            }
            folder = visitor.new_folder()
            rows = [
                [
                    expression,
                    name,
                    " ".join(f"{edge:.0f}" for edge in answer.box),
                    f"{answer.score:.2f}",
                    sure(answer),
                ]
                for name, answers in found.items()
                for expression, answer in zip(asked.expressions, answers, strict=True)
            ]
            drawn = {
                name: self._images(folder, asked, answers, which, name) for name, answers in found.items()
            }
            grid = _saved(folder / "heads.png", draw_grid(asked.sums, sets["A"], sets.get("B", ())))
            return (
                *drawn["A"],
                *drawn.get("B", (None, None)),
                rows,
                grid,
                *self._downloads(folder, asked, found["A"]),
            )

    def end(self, request: gr.Request) -> None:
        """The page was closed."""
        self.visitors.end(request.session_hash)

    def make_room(self) -> None:
        """Delete the oldest uploads, of visitors who have left, where there are too many."""
        make_room(entry for entry in self.folder.iterdir() if entry not in self.own)

    def _count(self, k: object) -> int:
        return int(number("k", k, self.k.minimum, self.k.maximum))

    def _options(self, sigma: object, binarise: Any, share: object) -> GroundingOptions:
        if binarise not in list(THRESHOLDS):
            raise UsageError(f"threshold: one of {', '.join(THRESHOLDS)}, not {shown(binarise)}")
        return replace(
            self.run.options.grounding,
            sigma=float(number("sigma", sigma, self.sigma.minimum, self.sigma.maximum)),
            binarise=binarise,
            top_mass=float(number("threshold", share, self.threshold.minimum, self.threshold.maximum)),
        )

    def _usable(self, mask: object) -> object:
        """The segmenter of that name if it can be had; else none, and the visitor is told why."""
        try:
            MODEL.take(self.segmenters.load, mask)
            return mask
        except (UsageError, WorkError) as error:
            gr.Warning(f"{error}. Until then the masks are those of the maps.")
            return "none"

    def _refined(self, asked: Asked, answer: Grounding, mask: object) -> Grounding:
        """The answer with the segmenter's mask, made in a turn at the model, on the image as it is kept."""
        if mask == "none":
            return answer
        small = resized(answer, asked.image.size)
        return resized(MODEL.take(self.segmenters.refine, mask, small, asked.image), answer.image_size)

    def upload_of(self, image: object) -> Path | None:
        """The file that gradio stored for the image that was sent, None if none was."""
        path = image.get("path") if isinstance(image, dict) else None
        if path is None:
            return None
        file = Path(str(path)).resolve()
        if not file.is_relative_to(self.folder) or not file.is_file():
            raise UsageError("the image is not here any more: choose it again")
        return file

    def _images(
        self, folder: Path, asked: Asked, answers: Sequence[Grounding], which: object, name: str
    ) -> tuple[str, str]:
        """The boxes of all expressions, and the map of one."""
        chosen = asked.expressions.index(which) if which in asked.expressions else 0
        return (
            _saved(folder / f"boxes_{name}.png", draw_boxes(asked.image, answers, asked.expressions)),
            _saved(folder / f"map_{name}.png", draw_heat(asked.image, answers[chosen])),
        )

    def _downloads(self, folder: Path, asked: Asked, answers: Sequence[Grounding]) -> tuple[str, str]:
        file = folder / "groundings.json"
        file.write_text(json.dumps(as_json(asked, answers), indent=2) + "\n")
        drawn = draw_boxes(asked.image, answers, asked.expressions, longest=None)
        return str(file), _saved(folder / "groundings.png", drawn)


def _stored_examples(folder: Path) -> list[tuple[str, str]]:
    """The examples as files, each with its expression."""
    folder.mkdir()
    return [
        (_saved(folder / f"{position}.png", image), expression)
        for position, (image, expression) in enumerate(example_images())
    ]


def _place(event: gr.EventData) -> object:
    """Where a selection was made. gradio's own SelectData raises on what no browser sends."""
    return event._data.get("index") if isinstance(event._data, dict) else None


def clicked(place: object, shape: tuple[int, int]) -> Head | None:
    """The head at a place of the grid, as the browser sends it. UsageError for what is none."""
    if not isinstance(place, list | tuple) or len(place) != 2:
        raise UsageError("a click has two coordinates")
    x, y = (number("a click", edge, 0, 10_000) for edge in place)
    return head_at(x, y, shape)


def _saved(path: Path, image: Image.Image) -> str:
    image.save(path, compress_level=1)  # fast, so that the image follows the slider
    return str(path)


def _names(heads: Any) -> str:
    return " ".join(str(Head(*head)) for head in heads)


def _image(title: str, name: str, **options: Any) -> gr.Image:
    """An image that visitors look at, under its title: gradio's own label would hide a corner of it."""
    with gr.Column(min_width=260):
        gr.Markdown(title)
        looks: dict[str, Any] = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
        return gr.Image(show_label=False, label=title, elem_id=name, **{**looks, **options})


def build(run: DemoRun, folder: Path) -> tuple[Page, gr.Blocks]:
    """The page for one model, not yet served; its files go below `folder`."""
    with gr.Blocks(title="Localization heads", analytics_enabled=False) as blocks:
        page = Page(run, folder)
        page.layout()
        page.wire(blocks.load)
        blocks.unload(page.end)
    page.answers.mkdir()
    page.own = frozenset(folder.iterdir())
    return page, blocks

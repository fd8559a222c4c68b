"""The gradio page: its components and their actions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from localization_heads.apps.demo.drawing import draw_boxes, draw_grid, draw_map, head_at, resized
from localization_heads.apps.demo.guard import make_room
from localization_heads.apps.demo.session import (
    MODEL_QUEUE,
    ImageQuestion,
    Segmenters,
    as_json,
    ask,
    check_number,
    confidence_cell,
    example_images,
    mean_title,
    parse_heads,
    toggle,
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
**{model}**, {layers} layers x {heads} heads. A few of them attend to what you name: those framed in the grid.
Choose an image, type an expression, press Ground (or Shift+Enter). The model runs once per question; sliders and
clicks only recompute the sum and the box."""
THRESHOLDS = {"mean": "mean", "otsu": "Otsu", "top_mass": "share of the attention"}


def show_errors(action: Callable[..., Any]) -> Callable[..., Any]:
    """Show an expected error of an action on the page, as one sentence."""

    @wraps(action)
    def wrapped(*arguments: Any) -> Any:
        try:
            return action(*arguments)
        except (UsageError, WorkError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return wrapped


class Page:
    """The components by name, and their actions.

    The actions receive the browser's data unprocessed (`preprocess=False`) and check it: gradio would decode an image
    of any size, and raise its own errors for an invalid number.
    """

    def __init__(self, run: DemoRun, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.answers = folder / "answers"
        self.permanent = frozenset[Path]()  # entries of the folder that belong to the page itself
        self.visitors = Visitors(self.answers, lambda entry: entry in self.permanent)
        self.segmenters = Segmenters(run)
        self.examples = _save_examples(folder / "examples")

    def layout(self) -> None:
        """Question on the left, answer on the right, settings and heads below."""
        lvlm = self.run.lvlm
        gr.Markdown(ABOUT.format(model=lvlm.name, layers=lvlm.num_layers, heads=lvlm.num_heads))
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                self._question_components()
            with gr.Column(scale=7, min_width=320):
                self._answer_components()
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                self._settings_components()
            with gr.Column(scale=7, min_width=320):
                self._grid_components()
        self.tracing = Tracing(self.run, self.visitors, self.upload_of)
        self.tracing.layout()

    def _question_components(self) -> None:
        image, text = self.examples[0]
        self.image = gr.Image(image, label="Image", elem_id="image", height=330)
        name = "Expressions, one per line or separated by ;"
        self.text = gr.Textbox(text, lines=2, max_lines=6, label=name, elem_id="expression")
        self.button = gr.Button("Ground", variant="primary", elem_id="ground")
        looks: dict[str, Any] = {"columns": 3, "height": 300, "allow_preview": False}
        self.gallery = gr.Gallery(self.examples, label="Examples", elem_id="examples", **looks)

    def _answer_components(self) -> None:
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

    def _settings_components(self) -> None:
        grounding = self.run.options.grounding
        self.which = gr.Dropdown([], label="Map of", elem_id="which")
        self.k = gr.Slider(
            1,
            max(10, self.run.options.k),
            self.run.options.k,
            step=1,
            label="k: number of selected heads",
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
            0.05,
            0.95,
            grounding.top_mass,
            step=0.05,
            label="share of the attention to keep",
            elem_id="threshold",
        )
        self.mask = gr.Radio(
            self.segmenters.names,
            value=self.segmenters.default,
            label="Segmenter (none: the pseudo-mask)",
            elem_id="mask",
        )
        self.compare = gr.Checkbox(False, label="Compare with a second set of heads", elem_id="compare")

    def _grid_components(self) -> None:
        self.edits = gr.Radio(["A", "B"], value="A", label="A click selects heads of set", visible=False)
        self.grid = _image(
            "**Heads by attention sum.** Click a head to select it (framed) or deselect it; dots mark set B.",
            "grid",
            buttons=[],
        )
        self.heads = gr.Textbox(label="Selected heads", elem_id="heads", placeholder="L2H0 L3H1")

    def wire(self, load: Callable[..., Any]) -> None:
        """Connect the components to the actions. `load` is the event of opening the page, which asks the first example.

        Only `ask` runs the model.
        """
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
        redraw: dict[str, Any] = {
            "fn": show_errors(self.redraw),
            "inputs": settings,
            "outputs": outputs,
            **raw,
        }
        ask: dict[str, Any] = {
            "fn": show_errors(self.ask),
            "inputs": [self.image, self.text, self.k],
            "outputs": [self.heads, self.which],
            **raw,
        }
        for event in (load, self.button.click, self.text.submit):
            event(**ask).success(**redraw)
        chosen = self.gallery.select(show_errors(self.choose), None, [self.image, self.text], **raw)
        chosen.success(**ask).success(**redraw)
        # `input`, since the keyboard does not fire `release`; of a drag, only the last pending step is drawn.
        last: dict[str, Any] = {"trigger_mode": "always_last", **raw}
        self.k.input(show_errors(self.best), self.k, self.heads, **last).success(**redraw)
        inputs = (self.sigma.input, self.binarise.input, self.mask.input, self.which.input)
        for event in (*inputs, self.heads.submit):
            event(**{**redraw, **last})
        self.threshold.input(lambda: "top_mass", None, self.binarise, **last).then(**redraw)
        self.compare.input(self.show_second, self.compare, [self.second, self.edits], **raw).then(**redraw)
        switched = self.grid.select(show_errors(self.switch), [self.heads, self.edits], self.heads, **raw)
        switched.success(**redraw)
        self.tracing.wire(self.image, self.heads, show_errors)

    def ask(self, request: gr.Request, image: object, text: object, k: object) -> tuple[Any, ...]:
        """Run the model; the first `k` heads are selected, the next `k` are set B."""
        count, upload = self._check_k(k), self.upload_of(image)
        with self.visitors.request(request.session_hash) as visitor:
            question = visitor.question = ask(self.run, upload, text)
            visitor.heads_b = list(question.ranked[count : 2 * count]) or list(question.ranked[:count])
            if upload:
                self.visitors.replace_upload(visitor, upload)
        if unknown := unknown_words(self.run.lvlm.processor.tokenizer, question.expressions):
            gr.Warning(f"words that the model does not know: {', '.join(unknown)}")
        choices = gr.Dropdown(choices=list(question.expressions), value=question.expressions[0])
        return _join_heads(question.ranked[:count]), choices

    def best(self, request: gr.Request, k: object) -> str:
        """The first `k` heads of the ranking."""
        count = self._check_k(k)
        with self.visitors.request(request.session_hash) as visitor:
            return _join_heads(visitor.require_question().ranked[:count])

    def choose(self, event: gr.EventData) -> tuple[str, str]:
        """The image and the expression of the example that was clicked."""
        index = _event_index(event)
        if not isinstance(index, int) or not 0 <= index < len(self.examples):
            raise UsageError(f"there is no example {shown(index)}")
        return self.examples[index]

    def show_second(self, is_visible: object) -> tuple[Any, ...]:
        """Show or hide the second set of heads."""
        return gr.Row(visible=bool(is_visible)), gr.Radio(visible=bool(is_visible))

    def switch(self, request: gr.Request, heads: object, edits: object, event: gr.EventData) -> str:
        """Switch the head that was clicked in the grid on or off, in set A or B."""
        with self.visitors.request(request.session_hash) as visitor:
            selected = parse_heads(heads)
            head = clicked_head(_event_index(event), visitor.require_question().shape)
            if head is not None and edits == "B":
                visitor.heads_b = toggle(visitor.heads_b, head)
            elif head is not None:
                selected = toggle(selected, head)
            return _join_heads(selected)

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
        """Recompute everything without the model: boxes, images, and the files to download."""
        options = self._options(sigma, binarise, share)
        with self.visitors.request(request.session_hash) as visitor:
            question, mask = visitor.require_question(), self._usable_segmenter(mask)
            sets = {"A": parse_heads(heads), **({"B": visitor.heads_b} if compare else {})}
            groundings = {
                name: [self._refine(question, grounding, mask) for grounding in question.ground(selected, options)]
                for name, selected in sets.items()
            }
            folder = visitor.new_folder()
            rows = [
                [
                    expression,
                    name,
                    " ".join(f"{edge:.0f}" for edge in grounding.box),
                    f"{grounding.score:.2f}",
                    confidence_cell(grounding),
                ]
                for name, of_set in groundings.items()
                for expression, grounding in zip(question.expressions, of_set, strict=True)
            ]
            images = {name: self._images(folder, question, of_set, which, name) for name, of_set in groundings.items()}
            grid = _save(folder / "heads.png", draw_grid(question.sums, sets["A"], sets.get("B", ())))
            return (
                *images["A"],
                *images.get("B", (None, None)),
                rows,
                grid,
                *self._downloads(folder, question, groundings["A"]),
            )

    def end(self, request: gr.Request) -> None:
        """Drop the state of a visitor who closed the page."""
        self.visitors.end(request.session_hash)

    def make_room(self) -> None:
        """Delete the oldest uploads if there are too many."""
        make_room(entry for entry in self.folder.iterdir() if entry not in self.permanent)

    def _check_k(self, k: object) -> int:
        return int(check_number("k", k, self.k.minimum, self.k.maximum))

    def _options(self, sigma: object, binarise: Any, share: object) -> GroundingOptions:
        if binarise not in list(THRESHOLDS):
            raise UsageError(f"threshold: one of {', '.join(THRESHOLDS)}, not {shown(binarise)}")
        return replace(
            self.run.options.grounding,
            sigma=float(check_number("sigma", sigma, self.sigma.minimum, self.sigma.maximum)),
            binarise=binarise,
            top_mass=float(check_number("threshold", share, self.threshold.minimum, self.threshold.maximum)),
        )

    def _usable_segmenter(self, mask: object) -> object:
        """The name of the segmenter if it can be loaded; otherwise "none", with a warning to the visitor."""
        try:
            MODEL_QUEUE.run(self.segmenters.load, mask)
            return mask
        except (UsageError, WorkError) as error:
            gr.Warning(f"{error}. Until then the masks are those of the maps.")
            return "none"

    def _refine(self, question: ImageQuestion, grounding: Grounding, mask: object) -> Grounding:
        """The grounding with the segmenter's mask, made on the stored image through the model queue."""
        if mask == "none":
            return grounding
        small = resized(grounding, question.image.size)
        refined = MODEL_QUEUE.run(self.segmenters.refine, mask, small, question.image)
        return resized(refined, grounding.image_size)

    def upload_of(self, image: object) -> Path | None:
        """The file that gradio stored for an uploaded image, None if no image was sent."""
        path = image.get("path") if isinstance(image, dict) else None
        if path is None:
            return None
        file = Path(str(path)).resolve()
        if not file.is_relative_to(self.folder) or not file.is_file():
            raise UsageError("the image is not here any more: choose it again")
        return file

    def _images(
        self, folder: Path, question: ImageQuestion, groundings: Sequence[Grounding], which: object, name: str
    ) -> tuple[str, str]:
        """Save two images: the boxes of all expressions, and the map of one."""
        index = question.expressions.index(which) if which in question.expressions else 0
        boxes = draw_boxes(question.image, groundings, question.expressions)
        return (
            _save(folder / f"boxes_{name}.png", boxes),
            _save(folder / f"map_{name}.png", draw_map(question.image, groundings[index])),
        )

    def _downloads(self, folder: Path, question: ImageQuestion, groundings: Sequence[Grounding]) -> tuple[str, str]:
        """Save the files to download: the groundings as JSON, and the boxes on the stored image."""
        file = folder / "groundings.json"
        file.write_text(json.dumps(as_json(question, groundings), indent=2) + "\n")
        boxes = draw_boxes(question.image, groundings, question.expressions, longest_side=None)
        return str(file), _save(folder / "groundings.png", boxes)


def _save_examples(folder: Path) -> list[tuple[str, str]]:
    """Save the examples; returns the file and the expression of each."""
    folder.mkdir()
    return [
        (_save(folder / f"{index}.png", image), expression)
        for index, (image, expression) in enumerate(example_images())
    ]


def _event_index(event: gr.EventData) -> object:
    """The index of a selection, unchecked: gradio's own SelectData raises on malformed data."""
    return event._data.get("index") if isinstance(event._data, dict) else None


def clicked_head(position: object, shape: tuple[int, int]) -> Head | None:
    """The head at a clicked pixel of the grid, None in its margins. UsageError for malformed coordinates."""
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise UsageError("a click has two coordinates")
    x, y = (check_number("a click", coordinate, 0, 10_000) for coordinate in position)
    return head_at(x, y, shape)


def _save(path: Path, image: Image.Image) -> str:
    image.save(path, compress_level=1)  # fast, so that the image follows the slider
    return str(path)


def _join_heads(heads: Any) -> str:
    return " ".join(str(Head(*head)) for head in heads)


def _image(title: str, name: str, **options: Any) -> gr.Image:
    """A read-only image under its title; gradio's own label would cover a corner of it."""
    with gr.Column(min_width=260):
        gr.Markdown(title)
        looks: dict[str, Any] = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
        return gr.Image(show_label=False, label=title, elem_id=name, **{**looks, **options})


def build(run: DemoRun, folder: Path) -> tuple[Page, gr.Blocks]:
    """Build the page for one model, with its files below `folder`. It is not served yet."""
    with gr.Blocks(title="Localization heads", analytics_enabled=False) as blocks:
        page = Page(run, folder)
        page.layout()
        page.wire(blocks.load)
        blocks.unload(page.end)
    page.answers.mkdir()
    page.permanent = frozenset(folder.iterdir())
    return page, blocks

"""`trace`: the answer to one query, and what the heads looked at when each of its words was written."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from localization_heads.data.images import load_image
from localization_heads.lvlm.trace import Trace
from localization_heads.options.tracing import TRACE_TOKENS
from localization_heads.report.trace import render_trace
from localization_heads.stages.run import Run
from localization_heads.stages.single import image_id
from localization_heads.store.files import writable_folder, write_bytes
from localization_heads.store.paths import entry_path

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traced:
    """The trace, its page and its figure."""

    trace: Trace
    paths: list[Path]


def trace(run: Run) -> Traced:
    """The words of the model's answer with their maps -> `attention/<id>_trace.html` and `_trace.png`."""
    run.options.require("image_file", "query")
    source, query = run.image(run.options.image_file), str(run.options.query)
    page = entry_path(run.attention_folder, image_id(run, source, query), "_trace.html")
    image = load_image(source)
    writable_folder(run.attention_folder)  # before the work, not after it
    run.check_named_heads()
    if run.options.grounding.contrast != "none":
        log.warning(
            "grounding.contrast: no other expressions are asked beside an answer, which is read without"
        )
    options = run.options
    heads = run.named_heads or run.lvlm.own_heads(image, query, options.criteria, options.k)
    found = run.lvlm.trace(
        image,
        query,
        heads,
        max_new_tokens=options.max_new_tokens or TRACE_TOKENS,
        trace=options.trace,
        options=options.grounding,
    )
    return Traced(found, write_trace(replace(found, image_file=str(source)), image, page))


def write_trace(found: Trace, image: Image.Image, page: Path) -> list[Path]:
    """The page, and beside it the figure."""
    from localization_heads import figures

    figure = page.with_suffix(".png")
    write_bytes(page, render_trace(found, image).encode())
    figures.plot_trace(image, found, figure)
    return [page, figure]

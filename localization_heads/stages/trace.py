"""`trace`: answers, and what the heads looked at when each of their words was written.

Of one image and query, or of every entry of a data file. A page is written last and says what it was made of, so that a
run that was killed goes on with the entries that have none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from localization_heads.data.images import load_image
from localization_heads.data.samples import Sample
from localization_heads.errors import BadEntry, NothingDoneError, WorkError
from localization_heads.heads.head import Head
from localization_heads.lvlm.answers.trace import Trace
from localization_heads.options.tracing import TRACE_TOKENS
from localization_heads.report.trace import render_trace
from localization_heads.stages.entries import Entries, select_entries
from localization_heads.stages.run import Run
from localization_heads.stages.single import image_id
from localization_heads.store.files import RunLock, writable_folder, write_bytes
from localization_heads.store.paths import entry_path
from localization_heads.version import __version__

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

_HEAD = 16_384
"""Bytes of a page in which it says what it was made of, its style after that."""


@dataclass(frozen=True)
class Traced:
    """What was traced, by id, and the files; None for an entry whose page was there already."""

    traces: dict[str, Trace | None]
    paths: list[Path]
    failures: Sequence[BadEntry] = field(default=())


def trace(run: Run) -> Traced:
    """The words of the model's answers with their maps -> `attention/<id>_trace.html` and `_trace.png`."""
    if run.options.grounding.contrast != "none":
        log.warning(
            "grounding.contrast: no other expressions are asked beside an answer, which is read without"
        )
    alone = bool(run.options.image_file or run.options.query)
    entries = _one_entry(run) if alone else select_entries(run)
    traces: dict[str, Trace | None] = {}
    paths: list[Path] = []
    with RunLock(run.folder):
        writable_folder(run.attention_folder)  # before the work, not after it
        run.check_named_heads()
        for sample in list(entries.samples):
            with entries.put_aside(sample, WorkError):
                page = entry_path(run.attention_folder, sample.id, "_trace.html")
                made_of = _made_of(run, entries.key(sample))
                if not alone and _is_there(page, made_of):
                    traces[sample.id] = None
                    continue
                image = load_image(sample.image)
                found = replace(_traced(run, image, sample.expression), image_file=str(sample.image))
                paths += write_trace(found, image, page, made_of)
                traces[sample.id] = found
    if not traces:
        raise NothingDoneError("no entry could be used", entries.in_order())
    return Traced(traces, paths, entries.in_order())


def _one_entry(run: Run) -> Entries:
    run.options.require("image_file", "query")
    source, query = run.image(run.options.image_file), str(run.options.query)
    id = image_id(run, source, query)
    entry_path(run.attention_folder, id, "_trace.html")
    load_image(source)  # a wrong image is wrong use, before the model is loaded
    return Entries([Sample(source, query, id=id)])


def _traced(run: Run, image: Image.Image, query: str) -> Trace:
    options = run.options
    heads: Sequence[Head] = run.named_heads or run.lvlm.own_heads(image, query, options.criteria, options.k)
    return run.lvlm.trace(
        image,
        query,
        heads,
        max_new_tokens=options.max_new_tokens or TRACE_TOKENS,
        trace=options.trace,
        options=options.grounding,
    )


def _made_of(run: Run, key: bytes) -> str:
    """Changes with the entry and with everything that its page depends on."""
    options = run.options
    heads = run.named_heads or [asdict(options.criteria), options.k]
    given = [
        run.model_settings,
        heads,
        asdict(options.trace),
        asdict(options.grounding),
        options.max_new_tokens,
    ]
    text = json.dumps([__version__, key.hex(), given], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_there(page: Path, made_of: str) -> bool:
    try:
        with page.open("rb") as file:
            return made_of.encode() in file.read(_HEAD) and page.with_suffix(".png").is_file()
    except OSError:
        return False


def write_trace(found: Trace, image: Image.Image, page: Path, made_of: str = "") -> list[Path]:
    """The page, and beside it the figure, which comes first."""
    from localization_heads import figures

    figure = page.with_suffix(".png")
    figures.plot_trace(image, found, figure)
    write_bytes(page, render_trace(found, image, made_of).encode())
    return [page, figure]

"""`trace`: answers, and what the heads looked at when each of their words was written.

Of one image and query, or of every entry of a data file. A page is written last and says what it was made of, so that a
run that was killed goes on with the entries that have none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from localization_heads.data.images import load_image
from localization_heads.data.samples import Sample
from localization_heads.errors import BadEntry, NothingDoneError, WorkError
from localization_heads.heads.head import Head
from localization_heads.lvlm.answers.trace import Trace
from localization_heads.options.surroundings import TRACE_TOKENS
from localization_heads.report.trace import render_trace
from localization_heads.stages.chunks import AttendedSample
from localization_heads.stages.entries import Entries, load_entries
from localization_heads.stages.flow import run_over_samples
from localization_heads.stages.run import Run
from localization_heads.stages.single import image_id
from localization_heads.store.files import RunLock, writable_folder, write_bytes
from localization_heads.store.paths import entry_path
from localization_heads.version import __version__

log = logging.getLogger(__name__)

_HEAD = 16_384
"""Bytes of a page in which it says what it was made of, its style after that."""


@dataclass(frozen=True)
class Traced:
    """What was traced: of one image and query its trace; by id, what was asked and answered; and the files.

    None stands for an entry whose page was there already.
    """

    alone: Trace | None
    answers: Mapping[str, tuple[str, str] | None]
    paths: list[Path]
    failures: Sequence[BadEntry] = field(default=())


class _Traced(NamedTuple):
    """A trace without the maps of all heads, of which its page has what it shows."""

    sample: Sample
    image: Image.Image
    trace: Trace
    page: bytes


def trace(run: Run) -> Traced:
    """The words of the model's answers with their maps -> `attention/<id>_trace.html` and `_trace.png`."""
    if run.options.grounding.contrast != "none":
        log.warning(
            "grounding.contrast: no other expressions are asked beside an answer, which is read without"
        )
    alone = bool(run.options.image_file or run.options.query)
    entries = _one_entry(run) if alone else load_entries(run)
    traces: list[Trace] = []
    answers: dict[str, tuple[str, str] | None] = {}
    paths: list[Path] = []

    def page_of(sample: Sample) -> Path:
        return entry_path(run.attention_folder, sample.id, "_trace.html")

    def is_done(sample: Sample) -> bool:
        if alone or not _is_there(page_of(sample), _made_of(recipe, entries.key(sample))):
            return False
        answers[sample.id] = None
        return True

    def keep(found: Sequence[_Traced]) -> None:
        for one in found:
            with entries.skip_on_error(one.sample, WorkError):
                paths.extend(_write(one.page, one.trace, one.image, page_of(one.sample)))
                answers[one.sample.id] = one.trace.query, one.trace.answer
                traces[:] = [one.trace]

    with RunLock(run.folder):
        writable_folder(run.attention_folder)  # before the work, not after it
        run.check_named_heads()
        recipe = _recipe(run)
        run_over_samples(
            run,
            entries,
            entries.samples,
            "trace",
            is_done=is_done,
            process=partial(_trace_each, heads=run.named_heads or (), recipe=recipe),
            save=keep,
            process_runs_model=True,
            capture_maps=False,
        )
    if not answers:
        raise NothingDoneError("no entry could be used", entries.sorted_failures())
    in_order = {one.id: answers[one.id] for one in entries.samples if one.id in answers}
    return Traced(traces[0] if alone else None, in_order, paths, entries.sorted_failures())


def _one_entry(run: Run) -> Entries:
    run.options.require("image_file", "query")
    source, query = run.resolve_image(run.options.image_file), str(run.options.query)
    id = image_id(run, source, query)
    entry_path(run.attention_folder, id, "_trace.html")
    load_image(source)  # a wrong image is wrong use, before the model is loaded
    return Entries([Sample(source, query, id=id)])


def _trace_each(
    run: Run, entries: Entries, attended: Sequence[AttendedSample], *, heads: Sequence[Head], recipe: str
) -> list[_Traced]:
    """The answer to each entry of a chunk; without `heads`, each with its own."""
    options, found = run.options, []
    for asked in attended:
        sample, image = asked.sample, asked.single_image
        with entries.skip_on_error(sample, WorkError):
            query = sample.expression
            one = run.lvlm.trace(
                image,
                query,
                heads or run.lvlm.pick_own_heads(image, query, options.criteria, options.k),
                max_new_tokens=options.max_new_tokens or TRACE_TOKENS,
                trace=options.trace,
                options=options.grounding,
            )
            one = replace(one, image_file=str(sample.image))
            page = render_trace(one, image, _made_of(recipe, entries.key(sample)))
            found.append(_Traced(sample, image, replace(one, every=None), page.encode()))
    return found


def _recipe(run: Run) -> str:
    """Everything that a page depends on besides its entry."""
    options = run.options
    heads = run.named_heads or [asdict(options.criteria), options.k]
    given = [
        run.model_settings,
        heads,
        asdict(options.trace),
        asdict(options.grounding),
        options.max_new_tokens,
    ]
    return json.dumps([__version__, given], sort_keys=True, default=str)


def _made_of(recipe: str, key: bytes) -> str:
    return hashlib.sha256(recipe.encode() + key).hexdigest()


def _is_there(page: Path, made_of: str) -> bool:
    try:
        with page.open("rb") as file:
            return made_of.encode() in file.read(_HEAD) and page.with_suffix(".png").is_file()
    except OSError:
        return False


def write_trace(found: Trace, image: Image.Image, page: Path) -> list[Path]:
    """The page, and beside it the figure."""
    return _write(render_trace(found, image, "").encode(), found, image, page)


def _write(content: bytes, found: Trace, image: Image.Image, page: Path) -> list[Path]:
    """The figure comes first: a page that is there is complete."""
    from localization_heads import figures

    figure = page.with_suffix(".png")
    figures.plot_trace(image, found, figure)
    write_bytes(page, content)
    return [page, figure]

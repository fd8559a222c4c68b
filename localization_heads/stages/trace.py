"""`trace`: the model's answers, with the attention maps of the heads at each generated word.

For one image and query, or for every entry of a data file. The page of an entry is written last and contains a digest
of its inputs, so an interrupted run resumes with the entries that lack an up-to-date page.
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
from localization_heads.options.stage_groups import DEFAULT_TRACE_TOKENS
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

DIGEST_WITHIN = 16_384
"""The first bytes of a page, which contain the digest of its inputs."""


@dataclass(frozen=True)
class TraceResult:
    """The results of `trace`.

    Args:
        single: the trace, if one image and query were named.
        answers: by entry id, the query and its answer; None for an entry whose page existed already.
    """

    single: Trace | None
    answers: Mapping[str, tuple[str, str] | None]
    paths: list[Path]
    failures: Sequence[BadEntry] = field(default=())


class _TracedEntry(NamedTuple):
    """The trace of an entry without the maps of all heads, and its rendered page, which contains what it shows."""

    sample: Sample
    image: Image.Image
    trace: Trace
    page: bytes


def trace(run: Run) -> TraceResult:
    """The words of the model's answers with their maps -> `attention/<id>_trace.html` and `_trace.png`."""
    if run.options.grounding.contrast != "none":
        log.warning("grounding.contrast is ignored: no other expressions are asked along with an answer")
    is_single = bool(run.options.image_file or run.options.query)
    entries = _single_entry(run) if is_single else load_entries(run)
    last_trace: Trace | None = None
    answers: dict[str, tuple[str, str] | None] = {}
    paths: list[Path] = []

    def page_of(sample: Sample) -> Path:
        return entry_path(run.attention_folder, sample.id, "_trace.html")

    def is_done(sample: Sample) -> bool:
        if is_single or not _is_up_to_date(page_of(sample), _digest(recipe, entries.key(sample))):
            return False
        answers[sample.id] = None
        return True

    def save(traced: Sequence[_TracedEntry]) -> None:
        nonlocal last_trace
        for entry in traced:
            with entries.skip_on_error(entry.sample, WorkError):
                paths.extend(_write(entry.page, entry.trace, entry.image, page_of(entry.sample)))
                answers[entry.sample.id] = entry.trace.query, entry.trace.answer
                last_trace = entry.trace

    with RunLock(run.folder):
        writable_folder(run.attention_folder)  # fails now, not after the model has run
        run.check_named_heads()
        recipe = _recipe(run)
        run_over_samples(
            run,
            entries,
            entries.samples,
            "trace",
            is_done=is_done,
            process=partial(_trace_each, heads=run.named_heads or (), recipe=recipe),
            save=save,
            process_runs_model=True,
            capture_maps=False,
        )
    if not answers:
        raise NothingDoneError("no entry could be used", entries.sorted_failures())
    in_order = {sample.id: answers[sample.id] for sample in entries.samples if sample.id in answers}
    return TraceResult(last_trace if is_single else None, in_order, paths, entries.sorted_failures())


def _single_entry(run: Run) -> Entries:
    run.options.require("image_file", "query")
    source, query = run.resolve_image(run.options.image_file), str(run.options.query)
    id = image_id(run, source, query)
    entry_path(run.attention_folder, id, "_trace.html")
    load_image(source)  # a bad image is a usage error, raised before the model is loaded
    return Entries([Sample(source, query, id=id)])


def _trace_each(
    run: Run, entries: Entries, attended: Sequence[AttendedSample], *, heads: Sequence[Head], recipe: str
) -> list[_TracedEntry]:
    """Trace the answer to each entry of a chunk; without `heads`, each with its own."""
    options, traced = run.options, []
    for entry in attended:
        sample, image = entry.sample, entry.single_image
        with entries.skip_on_error(sample, WorkError):
            query = sample.expression
            trace = run.lvlm.trace(
                image,
                query,
                heads or run.lvlm.pick_own_heads(image, query, options.criteria, options.k),
                max_new_tokens=options.max_new_tokens or DEFAULT_TRACE_TOKENS,
                trace=options.trace,
                options=options.grounding,
            )
            trace = replace(trace, image_file=str(sample.image))
            page = render_trace(trace, image, _digest(recipe, entries.key(sample)))
            traced.append(_TracedEntry(sample, image, replace(trace, every=None), page.encode()))
    return traced


def _recipe(run: Run) -> str:
    """Everything that a page depends on besides its entry, as JSON."""
    options = run.options
    heads = run.named_heads or [asdict(options.criteria), options.k]
    settings = [
        run.model_settings,
        heads,
        asdict(options.trace),
        asdict(options.grounding),
        options.max_new_tokens,
    ]
    return json.dumps([__version__, settings], sort_keys=True, default=str)


def _digest(recipe: str, key: bytes) -> str:
    """The digest of everything that an entry's page depends on."""
    return hashlib.sha256(recipe.encode() + key).hexdigest()


def _is_up_to_date(page: Path, digest: str) -> bool:
    try:
        with page.open("rb") as file:
            return digest.encode() in file.read(DIGEST_WITHIN) and page.with_suffix(".png").is_file()
    except OSError:
        return False


def write_trace(trace: Trace, image: Image.Image, page: Path) -> list[Path]:
    """Write the page of a trace, and its figure next to it; returns both paths."""
    return _write(render_trace(trace, image, "").encode(), trace, image, page)


def _write(content: bytes, trace: Trace, image: Image.Image, page: Path) -> list[Path]:
    # The figure is written first, so that a page that exists is complete.
    from localization_heads import figures

    figure = page.with_suffix(".png")
    figures.plot_trace(image, trace, figure)
    write_bytes(page, content)
    return [page, figure]

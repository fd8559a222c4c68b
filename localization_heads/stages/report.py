"""`report.html` at the end of `batch`, `find` and `evaluate`: what is kept for it on the way, and its writing."""

from __future__ import annotations

import platform
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localization_heads.attention import AttentionMaps
from localization_heads.data.masks import read_mask
from localization_heads.data.samples import Sample, decode_mask
from localization_heads.errors import UsageError, WorkError
from localization_heads.evaluation.head_iou import box_ious, mean_ious
from localization_heads.grounding.ground import Grounding
from localization_heads.heads.head import Head
from localization_heads.heads.record import HeadRanking
from localization_heads.options.compose import flat
from localization_heads.options.groups import GroundingOptions
from localization_heads.report.content import (
    LEAST_FREQUENCY,
    MAX_BOXES,
    Card,
    Gallery,
    HeadFacts,
    Report,
    outline,
    thumbnail,
    tiny_map,
)
from localization_heads.stages.entries import Entries
from localization_heads.stages.outcome import Outcome
from localization_heads.stages.run import Run
from localization_heads.store.files import write_bytes
from localization_heads.store.results import load_ranking
from localization_heads.store.statistics import StatisticsStore

if TYPE_CHECKING:
    from PIL import Image


MAPS_SHOWN = 3
"""Maps of single heads on a card; the combined map is of all heads."""
MEASURED_HEADS = 128
"""Heads whose IoU is measured: all of a small model, the best of a large one, if they are known beforehand."""
MEASURED_SAMPLES = 200
FEWER_SAMPLES = 50
"""Samples on which all heads of a large model are measured: each box takes 0.3 ms."""

ROWS = 256
"""Samples whose statistics are in memory at a time."""

FROM_FILE = (
    "The ranking of heads.json, which lists the kept heads only: it was not made anew on these samples."
)


class SingleHeadIoU(NamedTuple):
    """Which heads are measured alone, by the boxes of their own maps, and on which samples (ids)."""

    heads: Sequence[Head] = ()
    samples: Container[str] = ()

    def measure(self, sample: Sample, maps: AttentionMaps, options: GroundingOptions) -> dict[str, Any]:
        """The IoU of every head, for `Outcome.measured`; nothing for the other samples."""
        if sample.bbox is None or sample.id not in self.samples:
            return {}
        return {"head_iou": box_ious(maps, self.heads, sample.bbox, options)}


class Reporter:
    """Chooses what of a run is kept for its report, a few kilobytes a sample, and writes the page at the end.

    Args:
        ranking: the heads that the run has found; without, those of the model's heads.json if it is there.
    """

    def __init__(self, run: Run, ranking: HeadRanking | None = None) -> None:
        self._run = run
        self._wanted = run.options.report
        self._ranking, self._unknown = (ranking, "") if ranking else _known_ranking(run)
        self._origin = "" if ranking else FROM_FILE
        self.gallery = Gallery(run.options.report_samples if self._wanted else 0)
        """Which of the samples that are worked on may be shown in the end: `offer_card` makes cards of those."""
        self._measured = self._heads_measured() if self._wanted else []

    @property
    def lacks_ranking(self) -> bool:
        """Whether the report would show a ranking of the run's own samples, had it one."""
        return self._wanted and self._ranking is None

    def _heads_measured(self) -> list[Head]:
        """Without a ranking all heads: nobody knows yet which are the best."""
        if self._ranking is not None:
            return _best(self._ranking)
        # Without the controls not every layer is run, and nothing will be ranked.
        return [Head(*place) for place in np.ndindex(_shape(self._run))] if self._run.options.controls else []

    def single_head_iou(self, entries: Entries) -> SingleHeadIoU:
        """The heads to measure alone, and the samples with a true box on which that is done; the same in every run."""
        heads = self._measured
        number = MEASURED_SAMPLES if len(heads) <= MEASURED_HEADS else FEWER_SAMPLES
        boxed = [sample.id for sample in entries.samples if sample.bbox is not None]
        return SingleHeadIoU(heads, set(boxed[:number])) if heads else SingleHeadIoU()

    @property
    def settings(self) -> list[Any]:
        """All that decides whether a sample gets a card."""
        return [self._wanted, self._run.options.report_samples, MAPS_SHOWN]

    def write(
        self,
        entries: Entries,
        outcomes: Sequence[Outcome] = (),
        *,
        store: StatisticsStore | None = None,
        metrics: Mapping[str, Any] | None = None,
        own: HeadRanking | None = None,
    ) -> list[Path]:
        """Write `report.html` into the model's folder -> its path; nothing with `report=false`.

        Args:
            store: the statistics of the samples that the ranking is of.
            own: a ranking of this run's samples, which did not choose the heads of their boxes. It is shown if no
                other is known.
        """
        if not self._wanted:
            return []
        from localization_heads.report.page import render

        run, by_id = self._run, {outcome.sample.id: outcome for outcome in outcomes}
        lines = {sample.line for sample in entries.samples} | {bad.line for bad in entries.failures}
        ious = [one for outcome in outcomes if (one := outcome.measured.get("head_iou"))]
        report = Report(
            stage=run.options.stage,
            model=run.lvlm.name,
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            facts=list(_facts(run)),
            options=list(flat(run.options)),
            num_entries=len(lines),
            heads=self._heads(entries, outcomes, store, ious, own),
            no_heads=f"No ranking: {self._unknown}. stage=find or stage=batch writes one.",
            no_scatter="" if ious else self._why_no_scatter(outcomes),
            metrics=metrics or {},
            cards=[_completed(card, by_id[card.id]) for card in self._shown(outcomes)],
            no_cards=self._why_no_cards(),
            num_grounded=len(outcomes),
            ious=[outcome.iou for outcome in outcomes if outcome.iou is not None],
            failures=entries.sorted_failures(),
        )
        path = run.folder / "report.html"
        write_bytes(path, render(report).encode(errors="replace"))
        return [path]

    def _heads(
        self,
        entries: Entries,
        outcomes: Sequence[Outcome],
        store: StatisticsStore | None,
        ious: Sequence[Sequence[float | None]],
        own: HeadRanking | None,
    ) -> HeadFacts | None:
        used, ranking, origin = _used(outcomes), self._ranking, self._origin
        if ranking is None and own is not None:
            ranking, origin = own, _own_origin(self._unknown, used)
        if ranking is None:
            return None
        shape = _shape(self._run)
        return HeadFacts(
            ranking=ranking,
            shape=shape,
            used=used if outcomes else [head.address for head in ranking.kept[: self._run.options.k]],
            bottom_row=None if store is None else _bottom_row(entries, store),
            iou=mean_ious(self._measured, shape, ious) if ious else None,
            iou_samples=len(ious),
            origin=origin,
        )

    def _why_no_scatter(self, outcomes: Sequence[Outcome]) -> str:
        if self._run.options.stage == "find":
            return "No IoU of single heads: find keeps no maps. stage=batch measures it where the data have true boxes."
        if all(outcome.sample.bbox is None for outcome in outcomes):
            return "No IoU of single heads: no entry has a true box (bbox) to compare with."
        return "No IoU of single heads: the entries that it was to be measured on have failed."

    def _why_no_cards(self) -> str:
        if self._run.options.stage == "find":
            return "No samples: find keeps only each head's sums and entropies. stage=batch shows maps and boxes."
        return "No samples: report_samples=0."

    def _shown(self, outcomes: Sequence[Outcome]) -> list[Card]:
        """The cards of the gallery, whichever run made them."""
        gallery = Gallery(self._run.options.report_samples)
        for outcome in outcomes:
            if card := outcome.card:
                gallery.offer(outcome.sample.line, _badness(outcome), partial(replace, card))
        return gallery.cards


def _badness(outcome: Outcome) -> float:
    """Higher for a lower IoU or, where there is no truth, for a lower score."""
    return -((outcome.prediction.score if outcome.iou is None else outcome.iou) or 0.0)


def offer_card(
    gallery: Gallery,
    outcome: Outcome,
    maps: AttentionMaps,
    grounding: Grounding,
    open_image: Callable[[], Image.Image | None],
) -> Card | None:
    """The card of a sample, made while its maps are at hand, if there is room for it.

    Boxes, masks and scores are added when the report is written.

    Args:
        open_image: None where the image cannot be opened any more.
    """
    region = maps.image_box, maps.image_size

    def card() -> Card:
        image = open_image()
        return Card(
            id=outcome.sample.id,
            expression=outcome.sample.expression,
            image_size=maps.image_size,
            image=thumbnail(image) if image else "",
            heads=grounding.heads,
            maps=tuple(tiny_map(maps.attention[head], *region) for head in grounding.heads[:MAPS_SHOWN]),
            combined=tiny_map(grounding.combined, *region),
            image_box=maps.image_box,
        )

    return gallery.offer(outcome.sample.line, _badness(outcome), card)


def _completed(card: Card, outcome: Outcome) -> Card:
    """The card with its boxes, masks and scores."""
    sample, prediction = outcome.sample, outcome.prediction
    masks = [one.mask for one in prediction.boxes or (prediction,) if one.mask is not None]
    found = [read_mask(mask, mask["size"][::-1]) for mask in masks[:MAX_BOXES]]
    return replace(
        card,
        boxes=tuple(outcome.boxes[:MAX_BOXES]),
        truths=sample.true_boxes[:MAX_BOXES],
        mask=outline(np.logical_or.reduce(found)) if found else "",
        truth_mask=_true_outline(outcome, card.image_size),
        score=prediction.score,
        iou=outcome.iou,
    )


def _true_outline(outcome: Outcome, size: tuple[int, int]) -> str:
    if outcome.sample.mask is None:
        return ""
    try:
        return outline(decode_mask(outcome.sample, size))
    except (UsageError, WorkError):  # evaluate reports it as a failure
        return ""


def _known_ranking(run: Run) -> tuple[HeadRanking | None, str]:
    """The ranking in the model's folder, or why there is none."""
    path = run.folder / "heads.json"
    if not path.is_file():
        return None, f"{path.name} is not there"
    try:
        ranking = load_ranking(path)
    except (UsageError, WorkError) as error:
        return None, f"{error}"
    if ranking.model != run.lvlm.name:
        return None, f"{path.name} is of another model, {ranking.model}"
    layers, heads = _shape(run)
    if any(head.layer >= layers or head.head >= heads for head in ranking.heads):
        return None, f"{path.name} names heads that this model does not have"
    return ranking, ""


def _own_origin(unknown: str, used: Sequence[Head]) -> str:
    boxes = " ".join(map(str, used)) or "each sample's own heads"
    return (
        f"Ranked on these samples, without their truth, for {unknown}. "
        f"The boxes of this page are those of {boxes}, which this ranking did not choose."
    )


def _best(ranking: HeadRanking) -> list[Head]:
    """Every head of a small model; of a large one those of the scatter, the best first."""
    heads = ranking.heads
    if len(heads) > MEASURED_HEADS:
        heads = tuple(h for h in heads if h.selection_frequency >= LEAST_FREQUENCY)[:MEASURED_HEADS]
    return [head.address for head in heads]


def _shape(run: Run) -> tuple[int, int]:
    return run.lvlm.num_layers, run.lvlm.num_heads


def _used(outcomes: Sequence[Outcome]) -> list[Head]:
    """The heads that made every box; none where the samples have picked their own."""
    heads = {tuple(outcome.prediction.heads) for outcome in outcomes}
    return [Head(*head) for head in heads.pop()] if len(heads) == 1 else []


def _bottom_row(entries: Entries, store: StatisticsStore) -> NDArray[np.float64] | None:
    """Share of the samples whose map has a whole positive bottom row, `[layer, head]`."""
    keys = [
        key for sample in entries.usable if (key := entries.stored_statistics_key(sample, store)) in store
    ]
    if not keys:
        return None
    flags = store.rows(keys).bottom_row_focus
    total = sum(flags[start : start + ROWS].sum(axis=0) for start in range(0, len(keys), ROWS))
    return np.asarray(total / len(keys))


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """What was run, on which data, with which versions."""
    lvlm = run.lvlm
    layers, heads = _shape(run)
    yield "model", lvlm.name
    yield "layers and heads", f"{layers} layers of {heads} heads, {lvlm.num_parameters:,} parameters"
    yield "weights", f"fingerprint {lvlm.fingerprint}"
    yield "data", str(run.options.data_file)
    yield "output", str(run.folder)
    if run.overrides is not None:
        yield "command line", " ".join(run.overrides) or "(no option given)"
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in ("localization-heads", "torch", "transformers", "numpy"):
        yield package, _version(package)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        from localization_heads.version import __version__

        return f"{__version__} (not installed)"

"""`report.html` of `batch`, `find` and `evaluate`: what is collected for it during the run, and its writing at the end.

What the page looks like is the matter of `localization_heads.report`.
"""

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
from localization_heads.options.compose import flatten
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


CARD_MAPS = 3
"""Maps of single heads on a card; its combined map is of all the heads used."""
IOU_HEADS = 128
"""Heads whose own boxes are scored: all heads of a small model; of a large one the best, if a ranking is known."""
IOU_SAMPLES = 200
"""Samples on which at most `IOU_HEADS` heads are scored."""
IOU_SAMPLES_ALL_HEADS = 50
"""Samples on which all heads of a large model are scored; each box takes 0.3 ms."""
ROW_BLOCK = 256
"""Samples whose statistics are read at a time."""

FROM_FILE = "The ranking of heads.json, which lists the kept heads only: it was not computed on these samples."


class SingleHeadIoU(NamedTuple):
    """Scores the boxes that single heads make by themselves.

    Args:
        heads: the heads to score.
        sample_ids: the samples to score them on.
    """

    heads: Sequence[Head] = ()
    sample_ids: Container[str] = ()

    def measure(self, sample: Sample, maps: AttentionMaps, options: GroundingOptions) -> dict[str, Any]:
        """The IoU of each head, for `Outcome.measured`; {} for a sample that is not scored."""
        if sample.bbox is None or sample.id not in self.sample_ids:
            return {}
        return {"head_iou": box_ious(maps, self.heads, sample.bbox, options)}


class Reporter:
    """Collects what a run's report shows, a few kilobytes per sample, and writes the page at the end.

    Args:
        ranking: the ranking that the run has made; without it, the model's heads.json is shown if there is one.
    """

    def __init__(self, run: Run, ranking: HeadRanking | None = None) -> None:
        self._run = run
        self._enabled = run.options.report
        self._ranking, self._why_no_ranking = (ranking, "") if ranking else _load_ranking(run)
        self._origin = "" if ranking else FROM_FILE
        self.gallery = Gallery(run.options.report_samples if self._enabled else 0)
        """Decides, while the run goes on, which samples may end up on the page; `offer_card` makes their cards."""
        self._iou_heads = self._choose_iou_heads() if self._enabled else []

    @property
    def needs_ranking(self) -> bool:
        """Whether the report has no ranking yet and would show one of the run's own samples."""
        return self._enabled and self._ranking is None

    def _choose_iou_heads(self) -> list[Head]:
        if self._ranking is not None:
            return _best_heads(self._ranking)
        if not self._run.options.controls:  # then not all layers are run, and no ranking is made
            return []
        return [Head(*index) for index in np.ndindex(_shape(self._run))]

    def single_head_iou(self, entries: Entries) -> SingleHeadIoU:
        """The heads to score by themselves, on the first samples that have a true box."""
        heads = self._iou_heads
        if not heads:
            return SingleHeadIoU()
        limit = IOU_SAMPLES if len(heads) <= IOU_HEADS else IOU_SAMPLES_ALL_HEADS
        boxed = [sample.id for sample in entries.samples if sample.bbox is not None]
        return SingleHeadIoU(heads, set(boxed[:limit]))

    @property
    def settings(self) -> list[Any]:
        """Everything that decides whether a sample gets a card, and what is on it."""
        return [self._enabled, self._run.options.report_samples, CARD_MAPS]

    def write(
        self,
        entries: Entries,
        outcomes: Sequence[Outcome] = (),
        *,
        store: StatisticsStore | None = None,
        metrics: Mapping[str, Any] | None = None,
        own_ranking: HeadRanking | None = None,
    ) -> list[Path]:
        """Write `report.html` into the model's folder -> its path; [] with `report=false`.

        Args:
            store: the statistics of the samples.
            own_ranking: a ranking of this run's samples, shown if there is no other. The boxes were not made with its
                heads.
        """
        if not self._enabled:
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
            options=list(flatten(run.options)),
            num_entries=len(lines),
            heads=self._head_facts(entries, outcomes, store, ious, own_ranking),
            no_heads=f"No ranking: {self._why_no_ranking}. stage=find or stage=batch writes one.",
            no_scatter="" if ious else self._why_no_scatter(outcomes),
            metrics=metrics or {},
            cards=[_complete_card(card, by_id[card.id]) for card in self._choose_cards(outcomes)],
            no_cards=self._why_no_cards(),
            num_grounded=len(outcomes),
            ious=[outcome.iou for outcome in outcomes if outcome.iou is not None],
            failures=entries.sorted_failures(),
        )
        path = run.folder / "report.html"
        write_bytes(path, render(report).encode(errors="replace"))
        return [path]

    def _head_facts(
        self,
        entries: Entries,
        outcomes: Sequence[Outcome],
        store: StatisticsStore | None,
        ious: Sequence[Sequence[float | None]],
        own_ranking: HeadRanking | None,
    ) -> HeadFacts | None:
        used, ranking, origin = _common_heads(outcomes), self._ranking, self._origin
        if ranking is None and own_ranking is not None:
            ranking, origin = own_ranking, _origin_of_own(self._why_no_ranking, used)
        if ranking is None:
            return None
        shape = _shape(self._run)
        return HeadFacts(
            ranking=ranking,
            shape=shape,
            used=used if outcomes else [head.address for head in ranking.kept[: self._run.options.k]],
            bottom_row=None if store is None else _bottom_row(entries, store),
            iou=mean_ious(self._iou_heads, shape, ious) if ious else None,
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

    def _choose_cards(self, outcomes: Sequence[Outcome]) -> list[Card]:
        """The cards of the final gallery. Workers and earlier runs chose theirs among fewer samples."""
        gallery = Gallery(self._run.options.report_samples)
        for outcome in outcomes:
            if card := outcome.card:
                gallery.offer(outcome.sample.line, _badness(outcome), partial(replace, card))
        return gallery.cards


def _badness(outcome: Outcome) -> float:
    """The negative IoU or, without a true box, the negative score."""
    return -((outcome.prediction.score if outcome.iou is None else outcome.iou) or 0.0)


def offer_card(
    gallery: Gallery,
    outcome: Outcome,
    maps: AttentionMaps,
    grounding: Grounding,
    open_image: Callable[[], Image.Image | None],
) -> Card | None:
    """Make a sample's card while its maps are in memory; None if the gallery has no room for it.

    Boxes, masks and scores are added when the report is written.

    Args:
        open_image: returns None if the image cannot be opened any more.
    """
    region = maps.image_box, maps.image_size

    def make_card() -> Card:
        image = open_image()
        return Card(
            id=outcome.sample.id,
            expression=outcome.sample.expression,
            image_size=maps.image_size,
            image=thumbnail(image) if image else "",
            heads=grounding.heads,
            maps=tuple(tiny_map(maps.attention[head], *region) for head in grounding.heads[:CARD_MAPS]),
            combined=tiny_map(grounding.combined, *region),
            image_box=maps.image_box,
        )

    return gallery.offer(outcome.sample.line, _badness(outcome), make_card)


def _complete_card(card: Card, outcome: Outcome) -> Card:
    """The card with boxes, masks and scores added."""
    sample, prediction = outcome.sample, outcome.prediction
    masks = [one.mask for one in prediction.boxes or (prediction,) if one.mask is not None]
    decoded = [read_mask(mask, mask["size"][::-1]) for mask in masks[:MAX_BOXES]]
    return replace(
        card,
        boxes=tuple(outcome.boxes[:MAX_BOXES]),
        truths=sample.true_boxes[:MAX_BOXES],
        mask=outline(np.logical_or.reduce(decoded)) if decoded else "",
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


def _load_ranking(run: Run) -> tuple[HeadRanking | None, str]:
    """The ranking of the model's heads.json, and if there is none, why."""
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


def _origin_of_own(why_no_other: str, used: Sequence[Head]) -> str:
    boxes = " ".join(map(str, used)) or "each sample's own heads"
    return (
        f"Ranked on these samples, without their ground truth, because {why_no_other}. "
        f"The boxes on this page were made by {boxes}, which this ranking did not choose."
    )


def _best_heads(ranking: HeadRanking) -> list[Head]:
    """All heads of a small model; of a large one the best of those in the scatter plot."""
    heads = ranking.heads
    if len(heads) > IOU_HEADS:
        heads = tuple(h for h in heads if h.selection_frequency >= LEAST_FREQUENCY)[:IOU_HEADS]
    return [head.address for head in heads]


def _shape(run: Run) -> tuple[int, int]:
    return run.lvlm.num_layers, run.lvlm.num_heads


def _common_heads(outcomes: Sequence[Outcome]) -> list[Head]:
    """The heads that made every box; [] if the samples picked their own."""
    heads = {tuple(outcome.prediction.heads) for outcome in outcomes}
    return [Head(*head) for head in heads.pop()] if len(heads) == 1 else []


def _bottom_row(entries: Entries, store: StatisticsStore) -> NDArray[np.float64] | None:
    """The share of samples in which a head's whole bottom row is positive, `[layer, head]`."""
    keys = [key for sample in entries.usable if (key := entries.stored_statistics_key(sample, store)) in store]
    if not keys:
        return None
    flags = store.rows(keys).bottom_row_focus
    total = sum(flags[start : start + ROW_BLOCK].sum(axis=0) for start in range(0, len(keys), ROW_BLOCK))
    return np.asarray(total / len(keys))


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """What was run, on which data and with which versions."""
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

"""`failures/`: the worst boxes of an evaluation, worst first, drawn one by one and on one sheet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localization_heads.data.images import image_size, load_image
from localization_heads.data.samples import Sample
from localization_heads.datasets.leakage import check_unseen
from localization_heads.errors import NothingDoneError, UsageError, WorkError
from localization_heads.evaluation.controls import CENTRE, DRAWS
from localization_heads.evaluation.head_iou import box_ious
from localization_heads.evaluation.judging import Judge, Scores, truth_of
from localization_heads.evaluation.metrics import THRESHOLDS
from localization_heads.evaluation.scores import Score, score_box
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.ranking import HeadRanking
from localization_heads.lvlm.native_box import BoxFormat, ask_for_box, wanted_format
from localization_heads.options.kinds import as_read
from localization_heads.stages.entries import Attended, Entries, select_entries, with_truth
from localization_heads.stages.find import draws_of, open_store, rank_entries
from localization_heads.stages.ground import Groundings, ground_all, settings
from localization_heads.stages.outcome import Outcome, save_per_sample, save_predictions
from localization_heads.stages.report import HEAD_IOU, Alone, Reporter
from localization_heads.stages.run import Run
from localization_heads.store.files import RunLock, replace_folder, write_json
from localization_heads.store.journal import ResultLog
from localization_heads.store.statistics import StatisticsStore

if TYPE_CHECKING:
    from PIL import Image


_THUMBNAIL = 3.0  # inches


def worst_outcomes(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """The `count` lowest of the boxes with an IoU below 0.5; of equal ones that with less energy, then file order."""
    failed = [outcome for outcome in outcomes if (outcome.iou or 0.0) < THRESHOLDS[0]]
    return sorted(failed, key=lambda outcome: (outcome.iou or 0.0, _energy(outcome)))[:count]


def _energy(outcome: Outcome) -> float:
    return Score.from_json((outcome.measured or {})["scores"]["heads"][0]).energy


def save_failed_boxes(run: Run, outcomes: Sequence[Outcome]) -> list[Path]:
    """Draw them into `failures/`, which is replaced as a whole; returns the sheet, if there is one.

    Each goes through the model once more: no map is kept while the data set is worked through.
    """
    from localization_heads import figures
    from localization_heads.figures.overlay import BoxPanel, shrink_to_panel

    folder = run.folder / "failures"
    panels = []
    with replace_folder(folder) as new:
        for number, outcome in enumerate(worst_outcomes(outcomes, run.options.worst), start=1):
            try:
                image = load_image(outcome.sample.image)
            except (UsageError, WorkError):  # gone meanwhile
                continue
            sample, grounding, iou = outcome.sample, _grounding(run, outcome, image), outcome.iou or 0.0
            path = new / f"{number:03d}_{sample.id}.png"
            title = f"{sample.expression} (IoU {iou:.2f})"
            figures.plot_grounding(image, grounding, path, truth=sample.bbox, expression=title)
            small = shrink_to_panel(image, _THUMBNAIL)
            assert small is not None
            panels.append(BoxPanel(small, image.size, sample.expression, grounding.box, sample.bbox, iou))
        if panels:
            title = f"The worst {len(panels)} of {len(outcomes)} boxes"
            figures.plot_boxes(panels, new / "worst.png", title=title)
    return [folder / "worst.png"] if panels else []


def _grounding(run: Run, outcome: Outcome, image: Image.Image) -> Grounding:
    """The outcome with its map, which was not kept: through the model once more, the box as it was scored."""
    heads = outcome.prediction.heads
    maps = run.lvlm.attend(image, outcome.sample.expression, last_layer=max(layer for layer, _ in heads))
    grounding = ground_maps(maps, heads, run.options.grounding)
    scored = outcome.prediction
    return replace(grounding, box=scored.bbox or grounding.box, score=scored.score or 0.0)


def evaluate(run: Run) -> Groundings:
    """Score every entry that has a true box or mask, and the controls beside it.

    Where no heads.json is known, the report ranks the heads on these entries. Their statistics are kept as `find`
    keeps them, so a `find` over the same entries is free; they take 0.03 s a sample for a model of 1,024 heads, and
    the boxes of all its single heads 0.3 s for each of the first fifty.
    """
    entries = with_truth(select_entries(run), "stage=evaluate", _with_box)
    check_unseen(run, entries.samples)
    with RunLock(run.folder):
        report = Reporter(run)
        judge = Judge(
            run.options.criteria,
            run.options.grounding,
            controls=run.options.controls,
            bootstrap=run.options.bootstrap,
            seed=run.options.random_seed,
        )
        store = open_store(run) if report.lacks_ranking and judge.controls else None
        native = wanted_format(run.lvlm, run.options.native, by_default=judge.controls)
        asked = EntryScorer(judge, native, report.alone(entries))
        depends = {**settings(run), **asked.settings(entries.samples), "report": report.settings}
        log = ResultLog(run.folder, "evaluate", depends)
        outcomes, drawn = ground_all(
            run,
            entries,
            log,
            asked.measure,
            report,
            store=store,
            every_layer=run.options.controls,
            measure_runs_model=asked.native is not None,
        )
        metrics = _metrics(run, asked, outcomes, len(entries.failures))
        paths = [
            save_predictions(run, outcomes, entries.in_order()),
            save_per_sample(run, outcomes, entries.in_order()),
            *save_failed_boxes(run, outcomes),
            run.folder / "metrics.json",
        ]
        write_json(paths[-1], metrics)
        own = None if store is None else _own_ranking(run, entries, store)
        paths += report.write(entries, outcomes, metrics=metrics, store=store, own=own)
        log.finish()
        return Groundings(outcomes, entries.in_order(), [*drawn, *paths], metrics)


def _own_ranking(run: Run, entries: Entries, store: StatisticsStore) -> HeadRanking | None:
    """What `find` would come to over these samples, for the report alone; None if no sample drawn could be used."""
    draws = draws_of(run, entries)
    try:
        return rank_entries(run, entries, draws, store)
    except NothingDoneError:
        return None


@dataclass(frozen=True)
class EntryScorer:
    """What is asked about each grounded entry.

    Args:
        native: how the model writes boxes, or None to leave that.
        alone: heads that are measured one by one, for the report.
    """

    judge: Judge
    native: BoxFormat | None
    alone: Alone = field(default_factory=Alone)

    def measure(self, run: Run, one: Attended, grounding: Grounding) -> dict[str, Any]:
        """Scores of every method by name, as lists; the heads' first."""
        truth = truth_of(one.sample, one.image.size)
        scores = self.judge.scores(
            one.maps, grounding, truth, partial(run.grounder(None).refine, image=one.image)
        )
        measured: dict[str, Any] = {"scores": scores}
        if self.native:
            box, answer = ask_for_box(run.lvlm, self.native, one.image, one.sample.expression)
            scores["native"] = [score_box(box, truth, one.image.size)]
            measured["native"] = {"box": None if box is None else list(box), "answer": answer}
        if one.sample.id in self.alone.samples:
            measured[HEAD_IOU] = box_ious(one.maps, self.alone.heads, truth.box, run.options.grounding)
        return measured

    def settings(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """All that the scores depend on besides the boxes."""
        digest = hashlib.sha256()
        for sample in samples:
            digest.update(json.dumps([sample.id, sample.bbox, _mask_identity(sample)]).encode())
        asked = None if self.native is None else [self.native.prompt, self.native.pattern]
        heads = [list(head) for head in self.alone.heads]
        options = [self.judge.controls, self.judge.seed, DRAWS, CENTRE, asked, heads]
        return {"truth": digest.hexdigest(), "evaluation": options}


def _mask_identity(sample: Sample) -> Any:
    """JSON values that change with the true mask: a PNG counts by its size and time of change."""
    mask = sample.mask
    if isinstance(mask, Path):
        try:
            status = mask.stat()
        except OSError:  # gone since the data file was read: its entry will fail
            return str(mask)
        return [str(mask), status.st_size, status.st_mtime_ns]
    if isinstance(mask, np.ndarray):
        return hashlib.sha256(mask.tobytes()).hexdigest()
    return dict(mask) if isinstance(mask, Mapping) else mask


def _with_box(sample: Sample) -> Sample:
    """A mask alone gives its tight box."""
    if sample.bbox is not None:
        return sample
    return replace(sample, bbox=truth_of(sample, image_size(sample.image)).box)


def _metrics(run: Run, scorer: EntryScorer, outcomes: Sequence[Outcome], num_failed: int) -> dict[str, Any]:
    """The content of `metrics.json`: the heads' numbers, the controls', and every choice that made them."""
    scored = [_scores(outcome) for outcome in outcomes]
    images = [outcome.sample.image_key for outcome in outcomes]
    numbers = scorer.judge.metrics(scored, images, num_failed)
    return {**numbers, "choices": _choices(run, scorer)}


def _scores(outcome: Outcome) -> Scores:
    scores = (outcome.measured or {})["scores"]
    return {name: [Score.from_json(score) for score in answers] for name, answers in scores.items()}


def _choices(run: Run, scorer: EntryScorer) -> dict[str, Any]:
    """Whatever the numbers depend on, by name."""
    return {
        **run.lvlm.choices,
        "data_file": str(run.options.data_file),
        "scenes": asdict(run.options.scenes) if run.options.data_file == "scenes" else None,
        "range": [run.options.start_index, run.options.end_index],
        **scorer.judge.choices(run.named_heads, run.options.k),
        "segmenter": as_read(run.options.segmenter),
        "native": scorer.native and scorer.native.prompt,
    }

"""`evaluate`: boxes and masks scored against the ground truth, next to controls; the worst boxes go to `failures/`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads.data.images import image_size, load_image
from localization_heads.data.masks import MaskSource
from localization_heads.data.samples import Sample, sample_name
from localization_heads.datasets.leakage import check_unseen
from localization_heads.errors import NothingDoneError, UsageError, WorkError
from localization_heads.evaluation.confidence import Claim, is_right
from localization_heads.evaluation.controls import CENTRE, DRAWS
from localization_heads.evaluation.judging import HEADS, Judge, overlap_of_all, truth_of
from localization_heads.evaluation.metrics import THRESHOLDS
from localization_heads.evaluation.protocols import named_protocol, protocol_block
from localization_heads.evaluation.scores import instance_metrics, score_box
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.record import HeadRanking
from localization_heads.lvlm.answers.box_formats import BoxFormat
from localization_heads.lvlm.native_box import generate_box, native_box_format
from localization_heads.options.declaration import active_values
from localization_heads.stages.chunks import AttendedSample
from localization_heads.stages.entries import Entries, load_entries, require_truth
from localization_heads.stages.find import draw_trials, rank_entries
from localization_heads.stages.ground import ground_all, grounding_settings
from localization_heads.stages.outcome import Outcome, Result, save_per_sample, save_predictions
from localization_heads.stages.report import Reporter, SingleHeadIoU
from localization_heads.stages.run import Run
from localization_heads.stages.statistics import open_statistics
from localization_heads.store.files import RunLock, replace_folder, write_json
from localization_heads.store.journal import ResultLog
from localization_heads.store.statistics import StatisticsStore

if TYPE_CHECKING:
    from PIL import Image


THUMBNAIL_SIZE = 3.0  # inches


def evaluate(run: Run) -> Result:
    """Score every entry with a ground-truth box or mask, next to the controls -> `metrics.json`, the report and more.

    Without a heads.json, the report ranks the heads on these entries. Their statistics go into the store of `find`, so
    a later `find` over the same entries need not run the model. For a model of 1,024 heads they take 0.03 s per
    sample, and the boxes of all its single heads 0.3 s for each of the first fifty samples.
    """
    from localization_heads import figures

    options = run.options
    entries = require_truth(load_entries(run), "stage=evaluate", complete_box, or_absent=True)
    check_unseen(entries.samples, run.heads_source, allowed=run.options.allow_leakage)
    run.check_clips()
    with RunLock(run.folder):
        report = Reporter(run)
        judge = Judge(
            options.criteria,
            options.grounding,
            controls=options.controls,
            bootstrap=options.bootstrap,
            seed=options.random_seed,
        )
        # Not for clips: a clip of only the frames that the ranking draws would have other maps.
        store = open_statistics(run) if report.needs_ranking and judge.controls and not run.frames_per_clip else None
        native = native_box_format(run.lvlm, options.native, by_default=judge.controls)
        scorer = EntryScorer(judge, native, report.single_head_iou(entries))
        log_settings = {
            **grounding_settings(run),
            **scorer.settings(entries.samples),
            "report": report.settings,
        }
        log = ResultLog(run.folder, "evaluate", log_settings)
        outcomes, drawn = ground_all(
            run,
            entries,
            log,
            scorer.measure,
            report.gallery,
            store=store,
            every_layer=options.controls,
            measure_runs_model=native is not None,
        )
        scored = [(scores, outcome) for outcome in outcomes if (scores := outcome.scores)]
        images = [outcome.sample.image_key for _, outcome in scored]
        metrics = judge.metrics([scores for scores, _ in scored], images, len(entries.failures))
        metrics |= _instance_metrics(run, outcomes)
        metrics |= judge.trust([_make_claim(outcome) for outcome in outcomes])
        protocol = protocol_block(
            [outcome.answer for outcome in outcomes],
            run.lvlm.note,
            by_image=options.bootstrap == "image",
            seed=options.random_seed,
        )
        metrics |= {**protocol, "choices": {**_choices(run, scorer), **named_protocol(protocol)}}
        paths = [
            save_predictions(run, outcomes, entries.sorted_failures()),
            save_per_sample(run, outcomes, entries.sorted_failures()),
            *draw_worst_boxes(run, outcomes, entries),
            run.folder / "metrics.json",
        ]
        write_json(paths[-1], metrics)
        if trust := metrics.get("confidence"):
            paths.append(run.draw(figures.plot_confidence, trust, path=run.folder / "confidence.png"))
        own_ranking = None if store is None else _rank_on_entries(run, entries, store)
        paths += report.write(entries, outcomes, metrics=metrics, store=store, own_ranking=own_ranking)
        log.finish()
        return Result([*drawn, *paths], entries.sorted_failures(), outcomes, metrics=metrics)


def complete_box(sample: Sample) -> Sample:
    """The sample with its one ground-truth box: if only a mask is given, the tight box of the mask.

    Samples of absent objects or with several true boxes are returned as they are.
    """
    if sample.absent or len(sample.boxes) > 1 or sample.bbox is not None:
        return sample
    if sample.boxes:
        return replace(sample, bbox=sample.boxes[0])
    return replace(sample, bbox=truth_of(sample, image_size(sample.single)).box)


def _instance_metrics(run: Run, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """F1 and Pr@(F1=1) over all entries; empty if each has one true box and one answer, which Acc@0.5 covers."""
    all_instances = run.options.instances == "all"
    if not all_instances and all(len(outcome.sample.boxes) <= 1 and not outcome.sample.absent for outcome in outcomes):
        return {}
    answers = {"boxes": [outcome.boxes for outcome in outcomes]}
    if all_instances:
        answers["single_box"] = [outcome.boxes[:1] for outcome in outcomes]
    truths = [outcome.sample.true_boxes for outcome in outcomes]
    by_image = run.options.bootstrap == "image"
    groups = [outcome.sample.image_key for outcome in outcomes] if by_image else None
    metrics = instance_metrics(answers, truths, groups=groups, seed=run.options.random_seed)
    return {**metrics.pop("boxes"), "num_answers": len(outcomes), **metrics}


def _make_claim(outcome: Outcome) -> Claim:
    sample, prediction = outcome.sample, outcome.prediction
    return Claim(
        confidence=prediction.confidence,
        presence=prediction.presence,
        calibrated=prediction.calibrated,
        absent=prediction.absent,
        right=bool(outcome.measured["right"]),
        present=not sample.absent,
        image=sample.image_key,
        expression=sample.expression,
    )


def _rank_on_entries(run: Run, entries: Entries, store: StatisticsStore) -> HeadRanking | None:
    """The ranking of `find` on these entries; None if none of the drawn samples could be used."""
    try:
        return rank_entries(run, entries, draw_trials(run, entries), store)
    except NothingDoneError:
        return None


def _choices(run: Run, scorer: EntryScorer) -> dict[str, Any]:
    """Every choice that the metrics depend on, by name."""
    options = run.options
    return {
        **run.lvlm.choices,
        "data_file": str(options.data_file),
        "scenes": asdict(options.scenes) if options.data_file == "scenes" else None,
        "range": [options.start_index, options.end_index],
        **scorer.judge.choices(run.named_heads, options.k),
        "heads_from": run.heads_from,
        "segmenter": active_values(options.segmenter),
        "native": scorer.native and scorer.native.prompt,
        "instances": options.instances,
        **({"instances_by": options.instances_by} if options.instances == "all" else {}),
        "zoom": options.zoom,
        **({"video": options.video, "frames_per_prompt": run.frames_per_clip} if run.frames_per_clip else {}),
    }


@dataclass(frozen=True)
class EntryScorer:
    """Scores each grounded entry while its maps are in memory.

    Args:
        native: how the model writes boxes; None does not ask for any.
        single_heads: the heads that are also scored one by one, for the report.
    """

    judge: Judge
    native: BoxFormat | None
    single_heads: SingleHeadIoU = field(default_factory=SingleHeadIoU)

    def measure(self, run: Run, entry: AttendedSample, groundings: Sequence[Grounding]) -> dict[str, Any]:
        """Whether the box is right and, with one true box, the scores of every method and of the model's own box."""
        sample, image, grounding = entry.sample, entry.single_image, groundings[0]
        measured: dict[str, Any] = {"right": is_right(sample, grounding.box)}
        overlap = overlap_of_all(sample, groundings)
        if overlap is not None:
            measured["overlap"] = overlap
        if sample.absent or len(sample.boxes) > 1:
            return measured
        truth = truth_of(sample, image.size)
        refine = partial(run.grounder(None).refine, image=image, name=f"a control of {sample_name(sample)}")
        scores = self.judge.scores(entry.maps, grounding, truth, refine)
        if grounding.absent:  # no answer
            scores[HEADS] = [score_box(None, truth, image.size)]
        measured["scores"] = scores
        if self.native:
            box, answer = generate_box(run.lvlm, self.native, image, sample.expression)
            scores["native"] = [score_box(box, truth, image.size)]
            measured["native"] = {"box": None if box is None else list(box), "answer": answer}
        return measured | self.single_heads.measure(sample, entry.maps, run.options.grounding)

    def settings(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Everything that the scores depend on besides the boxes."""
        native = None if self.native is None else [self.native.prompt, self.native.pattern]
        heads = [list(head) for head in self.single_heads.heads]
        options = [self.judge.controls, self.judge.seed, DRAWS, CENTRE, native, heads]
        return {"truth": truth_digest(samples), "evaluation": options}


def truth_digest(samples: Sequence[Sample]) -> str:
    """A SHA-256 hex digest of the samples' ground truth."""
    digest = hashlib.sha256()
    for sample in samples:
        truth = [sample.id, sample.bbox, _mask_identity(sample.mask), _mask_identity(sample.ignore)]
        truth += [sample.boxes, sample.absent] if sample.boxes or sample.absent else []
        protocol = sample.facts.get("protocol")
        truth += [protocol] if sample.absent or protocol == "grefcoco" else []
        digest.update(json.dumps(truth).encode())
    return digest.hexdigest()


def _mask_identity(mask: MaskSource | None) -> Any:
    """JSON values that change with a mask of a data file; for a PNG, its path, size and modification time."""
    if isinstance(mask, list | tuple):
        return [_mask_identity(part) if isinstance(part, Path) else part for part in mask]
    if not isinstance(mask, Path):
        return mask
    try:
        status = mask.stat()
    except OSError:  # deleted since the data file was read: its entry will fail
        return str(mask)
    return [str(mask), status.st_size, status.st_mtime_ns]


def worst_outcomes(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """The `count` lowest IoUs below 0.5; ties go to the lower pointing energy, then to file order."""
    scored = (outcome for outcome in outcomes if outcome.measured.get("scores"))
    failed = [outcome for outcome in scored if (outcome.iou or 0.0) < THRESHOLDS[0]]
    return sorted(failed, key=lambda outcome: (outcome.iou or 0.0, outcome.scores[HEADS][0].energy))[:count]


def draw_worst_boxes(run: Run, outcomes: Sequence[Outcome], entries: Entries) -> list[Path]:
    """Draw the worst boxes, one by one and on one sheet, into a new folder `failures/`; returns the sheet, if any."""
    from localization_heads import figures
    from localization_heads.figures.overlay import BoxPanel, shrink_to_panel

    folder = run.folder / "failures"
    panels = []
    with replace_folder(folder) as new_folder:
        for number, outcome in enumerate(worst_outcomes(outcomes, run.options.worst), start=1):
            try:
                image = load_image(outcome.sample.single)
            except (UsageError, WorkError):  # deleted in the meantime
                continue
            sample, iou = outcome.sample, outcome.iou or 0.0
            grounding = _ground_again(run, outcome, image, entries.siblings(sample))
            path = new_folder / f"{number:03d}_{sample.id}.png"
            title = f"{sample.expression} (IoU {iou:.2f})"
            figures.plot_grounding(image, grounding, path, truth=sample.bbox, expression=title)
            thumbnail = shrink_to_panel(image, THUMBNAIL_SIZE)
            assert thumbnail is not None
            panels.append(BoxPanel(thumbnail, image.size, sample.expression, grounding.box, sample.bbox, iou))
        if panels:
            title = f"The worst {len(panels)} of {len(outcomes)} boxes"
            figures.plot_boxes(panels, new_folder / "worst.png", title=title)
    return [folder / "worst.png"] if panels else []


def _ground_again(run: Run, outcome: Outcome, image: Image.Image, siblings: Sequence[str]) -> Grounding:
    """The grounding of an outcome with its map, which takes another forward pass, and with the box as it was scored."""
    prediction = outcome.prediction
    last_layer = max(layer for layer, _ in prediction.heads)
    extra_prompts = replace(run.extra_prompts(prediction.heads), signals=False)
    maps = run.lvlm.attend(
        image,
        run.query_for(outcome.sample.expression),
        last_layer=last_layer,
        extra_prompts=extra_prompts,
        siblings=siblings,
    )
    grounding = ground_maps(maps, prediction.heads, run.options.grounding)
    return replace(grounding, box=prediction.bbox or grounding.box, score=prediction.score or 0.0)

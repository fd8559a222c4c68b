"""`evaluate`: boxes and masks against the truth, beside the controls; the worst boxes are drawn into `failures/`."""

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
from localization_heads.options.kinds import as_read
from localization_heads.stages.chunks import AttendedSample
from localization_heads.stages.entries import Entries, load_entries, require_truth
from localization_heads.stages.find import draw_trials, rank_entries
from localization_heads.stages.ground import ground_all, settings
from localization_heads.stages.outcome import Outcome, Result, save_per_sample, save_predictions
from localization_heads.stages.report import Reporter, SingleHeadIoU
from localization_heads.stages.run import Run
from localization_heads.stages.statistics import open_statistics
from localization_heads.store.files import RunLock, replace_folder, write_json
from localization_heads.store.journal import ResultLog
from localization_heads.store.statistics import StatisticsStore

if TYPE_CHECKING:
    from PIL import Image


def evaluate(run: Run) -> Result:
    """Score every entry that has a true box or mask, beside the controls.

    Where no heads.json is known, the report ranks the heads on these entries. Their statistics are kept as `find`
    keeps them, so a `find` over the same entries is free; they take 0.03 s a sample for a model of 1,024 heads, and
    the boxes of all its single heads 0.3 s for each of the first fifty.
    """
    from localization_heads import figures

    options = run.options
    entries = require_truth(load_entries(run), "stage=evaluate", with_box, or_absent=True)
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
        # a clip of the few frames that a ranking draws would have other maps
        store = (
            open_statistics(run)
            if report.needs_ranking and judge.controls and not run.frames_per_clip
            else None
        )
        native = native_box_format(run.lvlm, options.native, by_default=judge.controls)
        scorer = EntryScorer(judge, native, report.single_head_iou(entries))
        depends = {**settings(run), **scorer.settings(entries.samples), "report": report.settings}
        log = ResultLog(run.folder, "evaluate", depends)
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
        numbers = judge.metrics([scores for scores, _ in scored], images, len(entries.failures))
        numbers |= _of_several(run, outcomes)
        numbers |= judge.trust([_claim(outcome) for outcome in outcomes])
        answers = [outcome.answer for outcome in outcomes]
        block = protocol_block(
            answers, run.lvlm.note, by_image=options.bootstrap == "image", seed=options.random_seed
        )
        metrics = {**numbers, **block, "choices": {**_choices(run, scorer), **named_protocol(block)}}
        paths = [
            save_predictions(run, outcomes, entries.sorted_failures()),
            save_per_sample(run, outcomes, entries.sorted_failures()),
            *save_failed_boxes(run, outcomes, entries),
            run.folder / "metrics.json",
        ]
        write_json(paths[-1], metrics)
        if trust := metrics.get("confidence"):
            paths.append(run.draw(figures.plot_confidence, trust, path=run.folder / "confidence.png"))
        own = None if store is None else _own_ranking(run, entries, store)
        paths += report.write(entries, outcomes, metrics=metrics, store=store, own_ranking=own)
        log.finish()
        return Result([*drawn, *paths], entries.sorted_failures(), outcomes, metrics=metrics)


def with_box(sample: Sample) -> Sample:
    """Without a box, the tight box of the mask is the true one; several boxes, or none of what is absent, stay so."""
    if sample.absent or len(sample.boxes) > 1 or sample.bbox is not None:
        return sample
    if sample.boxes:
        return replace(sample, bbox=sample.boxes[0])
    return replace(sample, bbox=truth_of(sample, image_size(sample.single)).box)


def _of_several(run: Run, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """F1 and Pr@(F1=1) over all entries; nothing where each has one true box and one answer, as in Acc@0.5."""
    plural = run.options.instances == "all"
    if not plural and not any(one.sample.absent or len(one.sample.boxes) > 1 for one in outcomes):
        return {}
    answers = {"boxes": [one.boxes for one in outcomes]}
    if plural:
        answers["single_box"] = [one.boxes[:1] for one in outcomes]
    truths = [one.sample.true_boxes for one in outcomes]
    groups = [one.sample.image_key for one in outcomes] if run.options.bootstrap == "image" else None
    found = instance_metrics(answers, truths, groups=groups, seed=run.options.random_seed)
    return {**found.pop("boxes"), "num_answers": len(outcomes), **found}


def _claim(outcome: Outcome) -> Claim:
    sample, said = outcome.sample, outcome.prediction
    return Claim(
        confidence=said.confidence,
        presence=said.presence,
        calibrated=said.calibrated,
        absent=said.absent,
        right=bool(outcome.measured["right"]),
        present=not sample.absent,
        image=sample.image_key,
        expression=sample.expression,
    )


def _own_ranking(run: Run, entries: Entries, store: StatisticsStore) -> HeadRanking | None:
    """The ranking that `find` would make of these samples; None if none of those drawn could be used."""
    try:
        return rank_entries(run, entries, draw_trials(run, entries), store)
    except NothingDoneError:
        return None


def _choices(run: Run, scorer: EntryScorer) -> dict[str, Any]:
    """Whatever the numbers depend on, by name."""
    options = run.options
    return {
        **run.lvlm.choices,
        "data_file": str(options.data_file),
        "scenes": asdict(options.scenes) if options.data_file == "scenes" else None,
        "range": [options.start_index, options.end_index],
        **scorer.judge.choices(run.named_heads, options.k),
        "heads_from": run.heads_from,
        "segmenter": as_read(options.segmenter),
        "native": scorer.native and scorer.native.prompt,
        "instances": options.instances,
        **({"instances_by": options.instances_by} if options.instances == "all" else {}),
        "zoom": options.zoom,
        **({"video": options.video, "frames_per_prompt": run.frames_per_clip} if run.frames_per_clip else {}),
    }


@dataclass(frozen=True)
class EntryScorer:
    """Measures each grounded entry.

    Args:
        native: how the model writes boxes; None does not ask it for any.
        alone: heads that are measured one by one, for the report.
    """

    judge: Judge
    native: BoxFormat | None
    alone: SingleHeadIoU = field(default_factory=SingleHeadIoU)

    def measure(self, run: Run, one: AttendedSample, found: Sequence[Grounding]) -> dict[str, Any]:
        """Whether the box is right; where there is one true box, every method's scores, and the model's own box."""
        grounding = found[0]
        measured: dict[str, Any] = {"right": is_right(one.sample, grounding.box)}
        overlap = overlap_of_all(one.sample, found)
        if overlap is not None:
            measured["overlap"] = overlap
        if one.sample.absent or len(one.sample.boxes) > 1:
            return measured
        truth = truth_of(one.sample, one.single_image.size)
        refine = partial(
            run.grounder(None).refine, image=one.single_image, name=f"a control of {sample_name(one.sample)}"
        )
        scores = self.judge.scores(one.maps, grounding, truth, refine)
        if grounding.absent:  # no answer
            scores[HEADS] = [score_box(None, truth, one.single_image.size)]
        measured["scores"] = scores
        if self.native:
            box, answer = generate_box(run.lvlm, self.native, one.single_image, one.sample.expression)
            scores["native"] = [score_box(box, truth, one.single_image.size)]
            measured["native"] = {"box": None if box is None else list(box), "answer": answer}
        return measured | self.alone.measure(one.sample, one.maps, run.options.grounding)

    def settings(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """All that the scores depend on besides the boxes."""
        asked = None if self.native is None else [self.native.prompt, self.native.pattern]
        heads = [list(head) for head in self.alone.heads]
        options = [self.judge.controls, self.judge.seed, DRAWS, CENTRE, asked, heads]
        return {"truth": truths(samples), "evaluation": options}


def truths(samples: Sequence[Sample]) -> str:
    """Hexadecimal digits that change with any truth of the samples."""
    digest = hashlib.sha256()
    for sample in samples:
        truth = [sample.id, sample.bbox, _identity(sample.mask), _identity(sample.ignore)]
        truth += [sample.boxes, sample.absent] if sample.boxes or sample.absent else []
        protocol = sample.facts.get("protocol")
        truth += [protocol] if sample.absent or protocol == "grefcoco" else []
        digest.update(json.dumps(truth).encode())
    return digest.hexdigest()


def _identity(mask: MaskSource | None) -> Any:
    """JSON values that change with a mask of a data file: of a PNG, its size and time of change."""
    if isinstance(mask, list | tuple):
        return [_identity(one) if isinstance(one, Path) else one for one in mask]
    if not isinstance(mask, Path):
        return mask
    try:
        status = mask.stat()
    except OSError:  # gone since the data file was read: its entry will fail
        return str(mask)
    return [str(mask), status.st_size, status.st_mtime_ns]


_THUMBNAIL = 3.0  # inches


def worst_outcomes(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """The `count` boxes of lowest IoU below 0.5; of equal ones those with less energy, then in file order."""
    scored = (outcome for outcome in outcomes if outcome.measured.get("scores"))
    failed = [outcome for outcome in scored if (outcome.iou or 0.0) < THRESHOLDS[0]]
    return sorted(failed, key=lambda outcome: (outcome.iou or 0.0, outcome.scores[HEADS][0].energy))[:count]


def save_failed_boxes(run: Run, outcomes: Sequence[Outcome], entries: Entries) -> list[Path]:
    """Draw the worst boxes, one by one and on one sheet, into `failures/`, which is replaced -> the sheet, if any."""
    from localization_heads import figures
    from localization_heads.figures.overlay import BoxPanel, shrink_to_panel

    folder = run.folder / "failures"
    panels = []
    with replace_folder(folder) as new:
        for number, outcome in enumerate(worst_outcomes(outcomes, run.options.worst), start=1):
            try:
                image = load_image(outcome.sample.single)
            except (UsageError, WorkError):  # gone meanwhile
                continue
            sample, iou = outcome.sample, outcome.iou or 0.0
            grounding = _grounding(run, outcome, image, entries.siblings(sample))
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


def _grounding(run: Run, outcome: Outcome, image: Image.Image, siblings: Sequence[str]) -> Grounding:
    """The outcome with its map, for which it goes through the model once more, and the box as it was scored."""
    scored = outcome.prediction
    last_layer = max(layer for layer, _ in scored.heads)
    extra_prompts = replace(run.extra_prompts(scored.heads), signals=False)
    maps = run.lvlm.attend(
        image,
        run.query_for(outcome.sample.expression),
        last_layer=last_layer,
        extra_prompts=extra_prompts,
        siblings=siblings,
    )
    grounding = ground_maps(maps, scored.heads, run.options.grounding)
    return replace(grounding, box=scored.bbox or grounding.box, score=scored.score or 0.0)

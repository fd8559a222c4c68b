"""Run a stage, show its result, return the exit status: one function a stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from localization_heads.apps import heads, scores, tables
from localization_heads.datasets import prepare
from localization_heads.errors import BadEntry, NothingDoneError, printable
from localization_heads.heads.record import HeadRanking
from localization_heads.options.compose import describe_preset
from localization_heads.scenes import write
from localization_heads.stages import (
    ablate,
    calibrate,
    doctor,
    evaluate,
    experiment,
    export,
    find,
    ground,
    labels,
    rank_files,
    single,
    trace,
    video,
)
from localization_heads.stages.outcome import Result
from localization_heads.stages.run import Run

log = logging.getLogger(__name__)


def _pipeline(run: Run) -> int:
    collected, analysed, visualised = single.pipeline(run)
    _show_collected(collected)
    _show_analysed(run, analysed)
    return _show_visualised(run, visualised)


def _prepare(run: Run) -> int:
    result = prepare.prepare(run.options, limit_train_only=not run.is_given("num_samples"))
    _show(tables.prepared_table(result), result.paths)
    if result.failures:
        tables.show(tables.reasons_table(result.failures))
    return 1 if result.failures else 0


def _doctor(run: Run) -> int:
    result = doctor.doctor(run)
    tables.show(tables.examination_table(result.examination))
    tables.show(tables.marked_prompt(result.examination), soft_wrap=True)
    tables.written(result.paths)
    return 0 if result.examination.is_well else 1


def _experiment(run: Run) -> int:
    is_ladder = run.options.experiment.names == ("ladder",)
    return _show_result(run, experiment.climb(run) if is_ladder else experiment.experiment(run))


def _calibrate(run: Run) -> int:
    result, calibration = calibrate.calibrate(run)
    return _show(scores.calibration_table(calibration), result.paths, result.failures)


def _trace(run: Run) -> int:
    traced = trace.trace(run)
    return _show(tables.traced_table(traced), traced.paths, traced.failures)


def _ground(run: Run) -> int:
    if run.options.video_file is None:
        return _show_result(run, ground.ground(run))
    followed = video.ground_video(run)
    return _show(tables.video_table(followed), followed.paths, followed.failures)


def _find(run: Run) -> int:
    if run.options.heads_by == "criteria":
        return _show_result(run, find.find(run))
    return _show_labelled(run, labels.find_by_labels(run))


def _rank(run: Run) -> int:
    if run.options.attention_files:
        return _show_result(run, rank_files.rank_files(run))
    if run.options.heads_by == "criteria":
        return _show_result(run, find.rank(run))
    return _show_labelled(run, labels.rank_by_stored_labels(run))


def _show_labelled(run: Run, found: labels.LabelRanking) -> int:
    for table in heads.label_tables(found):
        tables.show(table)
    if found.result.ranking:
        _show_found_again(run, found.result.ranking)
    tables.written(found.result.paths)
    return tables.show_failures(found.result.failures)


STAGES: dict[str, Callable[[Run], int]] = {
    "collect": lambda run: _show_collected(single.collect(run)),
    "analyze": lambda run: _show_analysed(run, single.analyze(run)),
    "visualize": lambda run: _show_visualised(run, single.visualize(run)),
    "pipeline": _pipeline,
    "find": _find,
    "rank": _rank,
    "batch": lambda run: _show_result(run, find.batch(run)),
    "ground": _ground,
    "evaluate": lambda run: _show_result(run, evaluate.evaluate(run)),
    "scenes": lambda run: _wrote([write.write_scenes(run.options.scenes)]),
    "doctor": _doctor,
    "experiment": _experiment,
    "export": lambda run: _wrote(export.export(run)),
    "prepare": _prepare,
    "calibrate": _calibrate,
    "trace": _trace,
    "ablate": lambda run: _show_result(run, ablate.ablate(run)),
}


def run_stage(run: Run) -> int:
    """The exit status of `stage=`. If no entry could be used, each one's reason is shown before the error."""
    started = time.monotonic()
    try:
        status = STAGES[run.options.stage](run)
        log.info("stage=%s took %.1f s", run.options.stage, time.monotonic() - started)
        return status
    except NothingDoneError as error:
        tables.show_failures(error.failures)
        raise


def _show(table: Table, paths: Sequence[Path], failures: Sequence[BadEntry] = ()) -> int:
    """The exit status: 1 where entries have failed."""
    tables.show(table)
    tables.written(paths)
    return tables.show_failures(failures)


def _wrote(paths: Sequence[Path]) -> int:
    tables.written(paths)
    return 0


def _show_collected(collected: single.CollectResult) -> int:
    if collected.answer is not None:
        tables.show(f"answer: {printable(collected.answer)}", markup=False, highlight=False)
    return _wrote([collected.path])


def _show_analysed(run: Run, analysed: single.AnalyzeResult) -> int:
    return _show(heads.analysis_table(analysed.rows, run.options.top_k), [analysed.path])


def _show_visualised(run: Run, visualised: single.VisualizeResult) -> int:
    read_out = describe_preset("grounding", run.options.grounding)
    tables.show(f"box: {tables.grounding_text(visualised.grounding, read_out)}", highlight=False)
    return _wrote(visualised.paths)


def _show_found_again(run: Run, ranking: HeadRanking) -> None:
    for line in heads.found_again(run, ranking):
        tables.show(line, markup=False, highlight=False)


def _show_result(run: Run, result: Result) -> int:
    """Everything that the stage has found; of an evaluation the metrics in place of the boxes."""
    if result.ranking:
        tables.show(heads.ranking_table(result.ranking, run.options.k))
        _show_found_again(run, result.ranking)
        if run.options.stage == "batch":
            tables.show(heads.of_boxes(run, result.ranking), markup=False, highlight=False)
    if result.metrics:
        tables.show(scores.metrics_table(result.metrics))
        if own := scores.protocol_table(result.metrics.get("protocol", {})):
            tables.show(own)
        if trust := result.metrics.get("confidence"):
            tables.show(scores.confidence_table(trust))
    elif result.outcomes:
        tables.show(
            tables.predictions_table(result.outcomes, describe_preset("grounding", run.options.grounding))
        )
    if result.outcomes and (line := heads.whose(run)):
        tables.show(line, markup=False, highlight=False)
    for finding in result.findings:
        tables.show(f"\n{finding.title}", style="bold", markup=False, highlight=False)
        for table in finding.tables:
            tables.show(scores.finding_table(table))
        tables.show(finding.reading, markup=False, highlight=False)
    tables.written(result.paths)
    return tables.show_failures(result.failures)

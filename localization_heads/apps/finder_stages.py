"""One function per stage: run it, print its result, return the exit status."""

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
    _show_analysis(run, analysed)
    return _show_visualization(run, visualised)


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
    tables.show_paths(result.paths)
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
    result = video.ground_video(run)
    return _show(tables.video_table(result), result.paths, result.failures)


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


def _show_labelled(run: Run, labelled: labels.LabelRanking) -> int:
    for table in heads.label_tables(labelled):
        tables.show(table)
    if labelled.result.ranking:
        _show_overlaps(run, labelled.result.ranking)
    tables.show_paths(labelled.result.paths)
    return tables.show_failures(labelled.result.failures)


STAGES: dict[str, Callable[[Run], int]] = {
    "collect": lambda run: _show_collected(single.collect(run)),
    "analyze": lambda run: _show_analysis(run, single.analyze(run)),
    "visualize": lambda run: _show_visualization(run, single.visualize(run)),
    "pipeline": _pipeline,
    "find": _find,
    "rank": _rank,
    "batch": lambda run: _show_result(run, find.batch(run)),
    "ground": _ground,
    "evaluate": lambda run: _show_result(run, evaluate.evaluate(run)),
    "scenes": lambda run: _show_paths([write.write_scenes(run.options.scenes)]),
    "doctor": _doctor,
    "experiment": _experiment,
    "export": lambda run: _show_paths(export.export(run)),
    "prepare": _prepare,
    "calibrate": _calibrate,
    "trace": _trace,
    "ablate": lambda run: _show_result(run, ablate.ablate(run)),
}


def run_stage(run: Run) -> int:
    """Run the stage of `stage=` and return the exit status.

    If no entry could be used, the reason of each is printed before the error is raised.
    """
    started = time.monotonic()
    try:
        status = STAGES[run.options.stage](run)
        log.info("stage=%s took %.1f s", run.options.stage, time.monotonic() - started)
        return status
    except NothingDoneError as error:
        tables.show_failures(error.failures)
        raise


def _show(table: Table, paths: Sequence[Path], failures: Sequence[BadEntry] = ()) -> int:
    """Print a table, the files written and the failed entries; returns 1 if there are any, else 0."""
    tables.show(table)
    tables.show_paths(paths)
    return tables.show_failures(failures)


def _show_paths(paths: Sequence[Path]) -> int:
    tables.show_paths(paths)
    return 0


def _show_collected(collected: single.CollectResult) -> int:
    if collected.answer is not None:
        tables.show(f"answer: {printable(collected.answer)}", markup=False, highlight=False)
    return _show_paths([collected.path])


def _show_analysis(run: Run, analysed: single.AnalyzeResult) -> int:
    return _show(heads.analysis_table(analysed.rows, run.options.top_k), [analysed.path])


def _show_visualization(run: Run, visualised: single.VisualizeResult) -> int:
    read_out = describe_preset("grounding", run.options.grounding)
    tables.show(f"box: {tables.grounding_text(visualised.grounding, read_out)}", highlight=False)
    return _show_paths(visualised.paths)


def _show_overlaps(run: Run, ranking: HeadRanking) -> None:
    for line in heads.overlap_lines(run, ranking):
        tables.show(line, markup=False, highlight=False)


def _show_result(run: Run, result: Result) -> int:
    """Print the ranking, the metrics or the boxes, and the tables of experiments, whichever the result has."""
    if result.ranking:
        tables.show(heads.ranking_table(result.ranking, run.options.k))
        _show_overlaps(run, result.ranking)
        if run.options.stage == "batch":
            tables.show(heads.grounding_heads_line(run, result.ranking), markup=False, highlight=False)
    if result.metrics:
        tables.show(scores.metrics_table(result.metrics))
        if protocol_table := scores.protocol_table(result.metrics.get("protocol", {})):
            tables.show(protocol_table)
        if confidence := result.metrics.get("confidence"):
            tables.show(scores.confidence_table(confidence))
    elif result.outcomes:
        tables.show(tables.predictions_table(result.outcomes, describe_preset("grounding", run.options.grounding)))
    if result.outcomes and (line := heads.published_list_line(run)):
        tables.show(line, markup=False, highlight=False)
    for finding in result.findings:
        tables.show(f"\n{finding.title}", style="bold", markup=False, highlight=False)
        for table in finding.tables:
            tables.show(scores.finding_table(table))
        tables.show(finding.reading, markup=False, highlight=False)
    tables.show_paths(result.paths)
    return tables.show_failures(result.failures)

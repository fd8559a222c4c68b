"""Run a stage, show its result, return the exit status: one function a stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from localization_heads.apps import tables
from localization_heads.apps.tables import metrics_table
from localization_heads.datasets import prepare
from localization_heads.errors import BadEntry, NothingDoneError, printable
from localization_heads.experiments.paper import Finding
from localization_heads.scenes import write
from localization_heads.stages import doctor, evaluate, experiment, export, find, ground, single
from localization_heads.stages.run import Run

log = logging.getLogger(__name__)


def collect_stage(run: Run) -> int:
    _show_collected(single.collect(run))
    return 0


def analyze_stage(run: Run) -> int:
    _show_analysed(run, single.analyze(run))
    return 0


def visualize_stage(run: Run) -> int:
    _show_visualised(single.visualize(run))
    return 0


def pipeline_stage(run: Run) -> int:
    collected, analysed, visualised = single.pipeline(run)
    _show_collected(collected)
    _show_analysed(run, analysed)
    _show_visualised(visualised)
    return 0


def find_stage(run: Run) -> int:
    return _show_discovered(run, find.find(run))


def rank_stage(run: Run) -> int:
    return _show_discovered(run, find.rank(run))


def batch_stage(run: Run) -> int:
    return _show_discovered(run, find.batch(run))


def ground_stage(run: Run) -> int:
    result = ground.ground(run)
    tables.show(tables.predictions_table(result.outcomes))
    tables.written(result.paths)
    return _show_failures(result.failures)


def evaluate_stage(run: Run) -> int:
    result = evaluate.evaluate(run)
    tables.show(metrics_table(result.metrics))
    tables.written(result.paths)
    return _show_failures(result.failures)


def scenes_stage(run: Run) -> int:
    tables.written([write.scenes(run)])
    return 0


def prepare_stage(run: Run) -> int:
    result = prepare.prepare(run)
    tables.show(tables.prepared_table(result))
    tables.written(result.paths)
    if result.failures:
        tables.show(tables.reasons_table(result.failures))
    return 1 if result.failures else 0


def doctor_stage(run: Run) -> int:
    result = doctor.doctor(run)
    examination = result.examination
    tables.show(tables.examination_table(examination))
    tables.show(tables.marked_prompt(examination), soft_wrap=True)
    tables.written(result.paths)
    return 0 if examination.is_well else 1


def experiment_stage(run: Run) -> int:
    if run.options.experiment.names == ("ladder",):
        return _show_findings(*experiment.climb(run))
    result = experiment.experiment(run)
    return _show_findings(result.findings, result.failures, result.paths)


def export_stage(run: Run) -> int:
    tables.written(export.export(run))
    return 0


STAGES: dict[str, Callable[[Run], int]] = {
    "collect": collect_stage,
    "analyze": analyze_stage,
    "visualize": visualize_stage,
    "pipeline": pipeline_stage,
    "find": find_stage,
    "rank": rank_stage,
    "batch": batch_stage,
    "ground": ground_stage,
    "evaluate": evaluate_stage,
    "scenes": scenes_stage,
    "doctor": doctor_stage,
    "experiment": experiment_stage,
    "export": export_stage,
    "prepare": prepare_stage,
}


def run_stage(run: Run) -> int:
    """The exit status of `stage=`. If no entry could be used, each one's reason is shown before the error."""
    started = time.monotonic()
    try:
        status = STAGES[run.options.stage](run)
        log.info("stage=%s took %.1f s", run.options.stage, time.monotonic() - started)
        return status
    except NothingDoneError as error:
        _show_failures(error.failures)
        raise


def _show_collected(collected: single.Collected) -> None:
    if collected.answer is not None:
        tables.show(f"answer: {printable(collected.answer)}", markup=False, highlight=False)
    tables.written([collected.path])


def _show_analysed(run: Run, analysed: single.Analysed) -> None:
    tables.show(tables.analysis_table(analysed.rows, run.options.top_k))
    tables.written([analysed.path])


def _show_visualised(visualised: single.Visualised) -> None:
    grounding = visualised.grounding
    heads = " ".join(map(str, grounding.heads))
    tables.show(
        f"box: {tables.box_text(grounding.box)}   score {grounding.score:.2f}   heads {heads}",
        highlight=False,
    )
    tables.written(visualised.paths)


def _show_discovered(run: Run, result: find.Discovered) -> int:
    tables.show(tables.ranking_table(result.ranking, run.options.k))
    if result.grounded:
        tables.show(tables.predictions_table(result.grounded))
    tables.written(result.paths)
    return _show_failures(result.failures)


def _show_findings(findings: Sequence[Finding], failures: Sequence[BadEntry], paths: Sequence[Path]) -> int:
    for finding in findings:
        tables.show(f"\n{finding.title}", style="bold", markup=False, highlight=False)
        for table in finding.tables:
            tables.show(tables.finding_table(table))
        tables.show(finding.reading, markup=False, highlight=False)
    tables.written(paths)
    return _show_failures(failures)


def _show_failures(failures: Sequence[BadEntry]) -> int:
    if not failures:
        return 0
    tables.show(tables.failures_table(failures))
    return 1

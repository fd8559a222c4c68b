"""Run a stage, show its result, return the exit status: one function a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from localization_heads.apps import tables
from localization_heads.data.jsonl import BadEntry
from localization_heads.stages import discovery, ground, scenes, single
from localization_heads.stages.run import Run

console = Console()


def collect(run: Run) -> int:
    _show_collected(single.collect(run))
    return 0


def analyze(run: Run) -> int:
    _show_analysed(run, single.analyze(run))
    return 0


def visualize(run: Run) -> int:
    _show_visualised(single.visualize(run))
    return 0


def pipeline(run: Run) -> int:
    collected, analysed, visualised = single.pipeline(run)
    _show_collected(collected)
    _show_analysed(run, analysed)
    _show_visualised(visualised)
    return 0


def find(run: Run) -> int:
    return _show_discovered(run, discovery.find(run))


def batch(run: Run) -> int:
    return _show_discovered(run, discovery.batch(run))


def ground_stage(run: Run) -> int:
    result = ground.ground(run)
    console.print(tables.predictions_table(result.outcomes))
    tables.written(console, result.paths)
    return _show_failures(result.failures)


def evaluate(run: Run) -> int:
    result = ground.evaluate(run)
    console.print(tables.metrics_table(result.metrics))
    tables.written(console, result.paths)
    return _show_failures(result.failures)


def scenes_stage(run: Run) -> int:
    tables.written(console, [scenes.scenes(run)])
    return 0


STAGES: dict[str, Callable[[Run], int]] = {
    "collect": collect,
    "analyze": analyze,
    "visualize": visualize,
    "pipeline": pipeline,
    "find": find,
    "batch": batch,
    "ground": ground_stage,
    "evaluate": evaluate,
    "scenes": scenes_stage,
}


def _show_collected(collected: single.Collected) -> None:
    if collected.answer is not None:
        console.print(f"answer: {collected.answer}", markup=False, highlight=False)
    tables.written(console, [collected.path])


def _show_analysed(run: Run, analysed: single.Analysed) -> None:
    console.print(tables.analysis_table(analysed.rows, run["top_k"]))
    tables.written(console, [analysed.path])


def _show_visualised(visualised: single.Visualised) -> None:
    grounding = visualised.grounding
    heads = " ".join(map(str, grounding.heads))
    console.print(
        f"box: {tables.box_text(grounding.box)}   score {grounding.score:.2f}   heads {heads}",
        highlight=False,
    )
    tables.written(console, visualised.paths)


def _show_discovered(run: Run, result: discovery.Discovered) -> int:
    console.print(tables.ranking_table(result.ranking, run["k"]))
    if result.grounded:
        console.print(tables.predictions_table(result.grounded))
    tables.written(console, result.paths)
    return _show_failures(result.failures)


def _show_failures(failures: Sequence[BadEntry]) -> int:
    if not failures:
        return 0
    console.print(tables.failures_table(failures))
    return 1

"""`ground`: a box and a mask for an expression, or for every entry of a data file. `evaluate` scores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from localization_heads.attention import Box
from localization_heads.data.images import load_image
from localization_heads.data.jsonl import BadEntry
from localization_heads.data.masks import read_mask
from localization_heads.data.samples import Sample, decode_mask
from localization_heads.errors import UsageError, WorkError
from localization_heads.evaluation.metrics import mask_overlap, pointing_hit, summarize
from localization_heads.grounding.maps import Grounding, ground_maps
from localization_heads.heads.criteria import head_statistics
from localization_heads.options import require
from localization_heads.stages.entries import Attended, Entries, attend_chunk, chunks, key_of, select_entries
from localization_heads.stages.outcome import Outcome, outcome_of, save_predictions
from localization_heads.stages.run import Run, check_heads
from localization_heads.stages.single import default_id
from localization_heads.store.atomic import write_json
from localization_heads.store.lock import RunLock
from localization_heads.store.paths import entry_path
from localization_heads.store.result_log import ResultLog


@dataclass(frozen=True)
class Groundings:
    """What `ground` and `evaluate` end with; `metrics` is empty after `ground`."""

    outcomes: list[Outcome]
    failures: list[BadEntry]
    paths: list[Path]
    metrics: dict[str, Any]


def ground(run: Run) -> Groundings:
    """Boxes and pseudo-masks for one picture, or for every entry of `data_file` if no picture is named."""
    with RunLock(run.folder):
        entries = _one_entry(run) if run["image_file"] else select_entries(run)
        log = ResultLog(run.folder, "ground", _settings(run))
        outcomes, drawn = _ground_all(run, entries, log)
        path = save_predictions(run, outcomes, entries.failures)
        log.finish()
        return Groundings(outcomes, entries.failures, [*drawn, path], {})


def evaluate(run: Run) -> Groundings:
    """`ground` over `data_file`, scored against its true boxes and masks -> `metrics.json`."""
    with RunLock(run.folder):
        entries = _with_truth(select_entries(run))
        log = ResultLog(run.folder, "ground", _settings(run))
        outcomes, drawn = _ground_all(run, entries, log)
        predictions = save_predictions(run, outcomes, entries.failures)
        metrics = _score(outcomes, len(entries.failures))
        write_json(run.folder / "metrics.json", metrics)
        log.finish()
        paths = [*drawn, predictions, run.folder / "metrics.json"]
        return Groundings(outcomes, entries.failures, paths, metrics)


def _one_entry(run: Run) -> Entries:
    require(run.options, "image_file", "query")
    id = str(run["save_id"] or default_id(run["image_file"], run["query"]))
    load_image(str(run["image_file"]))  # a wrong picture is wrong use here, not a failed entry
    run.lvlm.prompt(str(run["query"]))
    return Entries([Sample(str(run["image_file"]), str(run["query"]), id=id)])


def _ground_all(run: Run, entries: Entries, log: ResultLog) -> tuple[list[Outcome], list[Path]]:
    """Outcomes in file order. What a killed run has finished is read from its log and not done again."""
    outcomes: list[Outcome] = []
    drawn: list[Path] = []
    bar = tqdm(total=len(entries.samples), desc="ground", unit="expression", disable=None)
    for chunk in chunks(entries.samples, run["batch_size"]):
        found = _from_log(log, chunk)
        if found is None:
            found = [_ground_one(run, one, drawn) for one in _attend(run, entries, chunk)]
            log.append([(key_of(outcome.sample), outcome.to_json()) for outcome in found])
        outcomes += found
        bar.update(len(chunk))
    bar.close()
    if not outcomes:
        raise WorkError(f"no entry could be grounded; the first: {entries.failures[0]}")
    return outcomes, drawn


def _settings(run: Run) -> dict[str, Any]:
    """All that a box depends on besides its sample."""
    return {
        "model": [run.lvlm.name, run.lvlm.fingerprint, run["conv_mode"], run.lvlm.system, run.spec.dtype],
        "heads": [list(head) for head in run.named_heads or ()],
        "options": [run["k"], run["batch_size"], dict(run["criteria"]), dict(run["grounding"])],
    }


def _from_log(log: ResultLog, chunk: Sequence[Sample]) -> list[Outcome] | None:
    """The outcomes of a chunk, if all of it was finished."""
    results = [log.get(key_of(sample)) for sample in chunk]
    if any(result is None for result in results):
        return None
    return [
        Outcome.from_json(sample, result) for sample, result in zip(chunk, results, strict=True) if result
    ]


def _attend(run: Run, entries: Entries, chunk: Sequence[Sample]) -> list[Attended]:
    """With fixed heads the layers above the deepest one are not run."""
    heads = run.named_heads
    if heads:
        check_heads(heads, run.lvlm.num_layers, run.lvlm.num_heads)
    return attend_chunk(run, entries, chunk, last_layer=max(head.layer for head in heads) if heads else None)


def _ground_one(run: Run, one: Attended, drawn: list[Path]) -> Outcome:
    heads = run.heads_for(head_statistics(one.maps.attention, run.criteria))
    grounding = ground_maps(one.maps, heads, run.grounding)
    limit = run["visualize_limit"] if run["visualize_batch"] else 0
    if limit is None or len(drawn) < limit:
        drawn.append(_draw(run, one, grounding))
    return outcome_of(one.sample, grounding)


def _draw(run: Run, one: Attended, grounding: Grounding) -> Path:
    from localization_heads import figures

    path = entry_path(run.attention_folder, one.sample.id, "_grounding.png")
    figure = figures.plot_grounding(
        one.image, grounding, path, truth=one.sample.bbox, expression=one.sample.expression
    )
    if run["show_plot"]:
        figures.show(figure)
    return path


def _with_truth(entries: Entries) -> Entries:
    """Only entries that say where the object is can be scored; a mask alone gives its tight box."""
    for sample in entries.samples:
        if sample.bbox is None and sample.mask is None:
            entries.fail(sample, "has neither bbox nor mask: there is nothing to score against")
    samples = []
    for sample in entries.good:
        try:
            samples.append(sample if sample.bbox else replace(sample, bbox=_mask_box(sample)))
        except (UsageError, WorkError) as error:
            entries.fail(sample, error)
    if not samples:
        raise UsageError(f"stage=evaluate needs entries with bbox or mask; the first: {entries.failures[0]}")
    return Entries(samples, entries.failures)


def _mask_box(sample: Sample) -> Box:
    """Tight box of the true mask, in pixels."""
    mask = decode_mask(sample, load_image(sample.image).size)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        raise UsageError("the mask is empty and there is no bbox")
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _score(outcomes: Sequence[Outcome], num_failed: int) -> dict[str, Any]:
    overlaps = [overlap for outcome in outcomes if (overlap := _overlap(outcome)) is not None]
    return summarize(
        [outcome.iou or 0.0 for outcome in outcomes],
        pointing=[
            pointing_hit(outcome.point, outcome.sample.bbox) for outcome in outcomes if outcome.sample.bbox
        ],
        overlaps=overlaps or None,
        num_failed=num_failed,
    )


def _overlap(outcome: Outcome) -> tuple[int, int] | None:
    """Pixels in the intersection and the union of predicted and true mask, where there is a true one."""
    predicted = outcome.prediction.mask
    if outcome.sample.mask is None or predicted is None:
        return None
    height, width = predicted["size"]
    return mask_overlap(read_mask(predicted, (width, height)), decode_mask(outcome.sample, (width, height)))

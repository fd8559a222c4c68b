"""`ground`: a box and a mask for an expression, or for every entry of a data file. `evaluate` scores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from localization_heads.attention import Box
from localization_heads.data.images import load_image
from localization_heads.data.jsonl import BadEntry
from localization_heads.data.masks import read_mask
from localization_heads.data.samples import Sample, decode_mask
from localization_heads.errors import NothingDoneError, UsageError, WorkError
from localization_heads.evaluation.metrics import mask_overlap, pointing_hit, summarize
from localization_heads.grounding.maps import Grounding, ground_maps
from localization_heads.heads.criteria import head_statistics
from localization_heads.options import require
from localization_heads.stages.entries import (
    Attended,
    Entries,
    attend,
    chunks,
    open_chunk,
    select_entries,
)
from localization_heads.stages.outcome import Outcome, outcome_of, save_predictions
from localization_heads.stages.run import Run, check_heads
from localization_heads.stages.single import default_id
from localization_heads.store.atomic import write_json
from localization_heads.store.lock import RunLock
from localization_heads.store.paths import entry_path
from localization_heads.store.result_log import ResultLog

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Groundings:
    """What `ground` and `evaluate` end with; `metrics` is empty after `ground`."""

    outcomes: list[Outcome]
    failures: list[BadEntry]
    paths: list[Path]
    metrics: dict[str, Any]


def ground(run: Run) -> Groundings:
    """Boxes and pseudo-masks for one picture, or for every entry of `data_file` if no picture is named."""
    alone = bool(run["image_file"] or run["query"])
    entries = _one_entry(run) if alone else select_entries(run)
    with RunLock(run.folder):
        log = ResultLog(run.folder, "ground_one" if alone else "ground", _settings(run))
        outcomes, drawn = _ground_all(run, entries, log)
        path = save_predictions(run, outcomes, entries.in_order(), alone=alone)
        log.finish()
        return Groundings(outcomes, entries.in_order(), [*drawn, path], {})


def evaluate(run: Run) -> Groundings:
    """`ground` over `data_file`, scored against its true boxes and masks -> `metrics.json`."""
    entries = _with_truth(select_entries(run))
    with RunLock(run.folder):
        log = ResultLog(run.folder, "ground", _settings(run))
        outcomes, drawn = _ground_all(run, entries, log)
        overlaps = _overlaps(outcomes, entries)
        outcomes = [outcome for outcome in outcomes if outcome.sample.id in overlaps]
        predictions = save_predictions(run, outcomes, entries.in_order())
        metrics = _score(outcomes, list(overlaps.values()), len(entries.failures))
        write_json(run.folder / "metrics.json", metrics)
        log.finish()
        paths = [*drawn, predictions, run.folder / "metrics.json"]
        return Groundings(outcomes, entries.in_order(), paths, metrics)


def _one_entry(run: Run) -> Entries:
    require(run.options, "image_file", "query")
    id = str(run["save_id"] or default_id(run["image_file"], run["query"]))
    entry_path(run.attention_folder, id, "_prediction.jsonl")
    load_image(str(run["image_file"]))  # a wrong picture is wrong use here, not a failed entry
    run.lvlm.prompt(str(run["query"]))
    return Entries([Sample(str(run["image_file"]), str(run["query"]), id=id)])


def _ground_all(run: Run, entries: Entries, log: ResultLog) -> tuple[list[Outcome], list[Path]]:
    """Outcomes in file order. What a killed run has finished is read from its log and not done again."""
    outcomes: list[Outcome] = []
    drawn: list[Path] = []
    bar = tqdm(total=len(entries.samples), desc="ground", unit="expression", disable=None)
    for chunk in chunks(entries.samples, run["batch_size"]):
        found = _from_log(log, entries, chunk)
        missing = {sample.line for sample in chunk} - {outcome.sample.line for outcome in found}
        # As in `collect`: the whole chunk goes through the model or nothing of it.
        opened = open_chunk(run, entries, chunk) if missing else []
        if any(sample.line in missing for sample, _ in opened):
            found = [_ground_one(run, one, drawn) for one in _attend(run, entries, opened)]
            log.append([(entries.key(outcome.sample), outcome.to_json()) for outcome in found])
        outcomes += found
        bar.update(len(chunk))
    bar.close()
    if not outcomes:
        raise NothingDoneError("no entry could be grounded", entries.in_order())
    return outcomes, drawn


def _settings(run: Run) -> dict[str, Any]:
    """All that a box depends on besides its sample."""
    return {
        "model": run.model_settings,
        "heads": [list(head) for head in run.named_heads or ()],
        "options": [run["k"], run["batch_size"], dict(run["criteria"]), dict(run["grounding"])],
    }


def _from_log(log: ResultLog, entries: Entries, chunk: Sequence[Sample]) -> list[Outcome]:
    """The outcomes of a chunk that are finished already."""
    results = [(sample, log.get(entries.key(sample))) for sample in chunk]
    return [Outcome.from_json(sample, result) for sample, result in results if result]


def _attend(run: Run, entries: Entries, opened: Sequence[tuple[Sample, Image.Image]]) -> list[Attended]:
    """With fixed heads the layers above the deepest one are not run."""
    heads = run.named_heads
    if heads:
        check_heads(heads, run.lvlm.num_layers, run.lvlm.num_heads)
    last_layer = max(head.layer for head in heads) if heads else None
    return attend(run, entries, opened, last_layer=last_layer)


def _ground_one(run: Run, one: Attended, drawn: list[Path]) -> Outcome:
    heads = run.named_heads or run.own_heads(head_statistics(one.maps.attention, run.criteria))
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
        raise UsageError(
            f"stage=evaluate needs entries with bbox or mask; the first: {entries.in_order()[0]}"
        )
    return Entries(samples, entries.failures)


def _mask_box(sample: Sample) -> Box:
    """Tight box of the true mask, in pixels."""
    mask = decode_mask(sample, load_image(sample.image).size)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        raise UsageError("the mask is empty and there is no bbox")
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _overlaps(outcomes: Sequence[Outcome], entries: Entries) -> dict[str, tuple[int, int] | None]:
    """By id; an entry whose true mask cannot be read is put aside."""
    overlaps = {}
    for outcome in outcomes:
        try:
            overlaps[outcome.sample.id] = _overlap(outcome)
        except UsageError as error:
            entries.fail(outcome.sample, error)
    return overlaps


def _score(
    outcomes: Sequence[Outcome], overlaps: Sequence[tuple[int, int] | None], num_failed: int
) -> dict[str, Any]:
    known = [overlap for overlap in overlaps if overlap is not None]
    return summarize(
        [outcome.iou or 0.0 for outcome in outcomes],
        pointing=[
            pointing_hit(outcome.point, outcome.sample.bbox) for outcome in outcomes if outcome.sample.bbox
        ],
        overlaps=known or None,
        num_failed=num_failed,
    )


def _overlap(outcome: Outcome) -> tuple[int, int] | None:
    """Pixels in the intersection and the union of predicted and true mask, where there is a true one."""
    predicted = outcome.prediction.mask
    if outcome.sample.mask is None or predicted is None:
        return None
    height, width = predicted["size"]
    return mask_overlap(read_mask(predicted, (width, height)), decode_mask(outcome.sample, (width, height)))

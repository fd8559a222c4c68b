"""`export`: the predictions and the heads of an earlier run in the file formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localization_heads.errors import UsageError
from localization_heads.heads.score_lists import as_mapping, as_objects, scores_of
from localization_heads.interop.coco import results_of, to_coco
from localization_heads.stages.entries import load_entries
from localization_heads.stages.ground import split_entries
from localization_heads.stages.run import Run
from localization_heads.store.files import write_json
from localization_heads.store.results import load_frequencies, load_ranking, read_predictions

PREDICTIONS, RESULTS = "predictions_coco.json", "predictions_coco_results.json"
HEADS, MAPPING, OBJECTS = "heads_scores.json", "heads_sparsemm.json", "heads_gaze.json"


def export(run: Run) -> list[Path]:
    """Write the predictions as a COCO data set and as COCO results, and the heads as score lists, as far as they exist.

    Raises:
        UsageError: this model's folder has neither predictions nor heads.
    """
    written = []
    if (run.folder / "predictions.jsonl").is_file():
        entries = load_entries(run)
        parts, _ = split_entries(run, entries)  # `ground` predicts each phrase of an entry by itself
        samples = {sample.id: sample for sample in [*parts.samples, *entries.samples]}
        coco = to_coco(read_predictions(run.folder / "predictions.jsonl"), samples)
        if not coco["annotations"]:
            raise UsageError(
                f"data_file={run.options.data_file} knows none of the entries in {run.folder / 'predictions.jsonl'}: "
                "name the data_file that they were made from"
            )
        write_json(run.folder / PREDICTIONS, coco)
        write_json(run.folder / RESULTS, results_of(coco))
        written += [run.folder / PREDICTIONS, run.folder / RESULTS]
    if (run.folder / "heads.json").is_file():
        written += _export_heads(run.folder)
    if not written:
        raise UsageError(
            f"stage=export: {run.folder} has neither predictions.jsonl nor heads.json; run stage=batch first"
        )
    return written


def _export_heads(folder: Path) -> list[Path]:
    """Write the ranking as lists of scores, and the selection frequency of every head as the mapping of SparseMM."""
    ranking = load_ranking(folder / "heads.json")
    contents: dict[str, Any] = {HEADS: scores_of(ranking), OBJECTS: as_objects(ranking)}
    if (folder / "heads.csv").is_file():
        contents[MAPPING] = as_mapping(load_frequencies(folder / "heads.csv"))
    for name, content in contents.items():
        write_json(folder / name, content)
    return [folder / name for name in contents]

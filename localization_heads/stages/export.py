"""`export`: the predictions and the heads of an earlier run in the forms that other tools open."""

from __future__ import annotations

from pathlib import Path

from localization_heads.errors import UsageError
from localization_heads.heads.score_lists import scores_of
from localization_heads.interop.coco import to_coco
from localization_heads.stages.entries import select_entries
from localization_heads.stages.ground import in_phrases
from localization_heads.stages.run import Run
from localization_heads.store.files import write_json
from localization_heads.store.results import load_ranking, read_predictions

PREDICTIONS = "predictions_coco.json"
HEADS = "heads_scores.json"


def export(run: Run) -> list[Path]:
    """Write `predictions_coco.json` and `heads_scores.json`, each where the run that it is made from is there.

    Raises:
        UsageError: this model's folder has neither predictions nor heads.
    """
    written = []
    if (run.folder / "predictions.jsonl").is_file():
        entries = select_entries(run)
        parts = in_phrases(run, entries)[0]  # what `ground` made of an entry with several phrases
        samples = {sample.id: sample for sample in [*parts.samples, *entries.samples]}
        coco = to_coco(read_predictions(run.folder / "predictions.jsonl"), samples)
        if not coco["annotations"]:
            raise UsageError(
                f"data_file={run.options.data_file} knows none of the entries in {run.folder / 'predictions.jsonl'}: "
                "name the data_file that they were made from"
            )
        write_json(run.folder / PREDICTIONS, coco)
        written.append(run.folder / PREDICTIONS)
    if (run.folder / "heads.json").is_file():
        write_json(run.folder / HEADS, scores_of(load_ranking(run.folder / "heads.json")))
        written.append(run.folder / HEADS)
    if not written:
        raise UsageError(
            f"stage=export: {run.folder} has neither predictions.jsonl nor heads.json; run stage=batch first"
        )
    return written

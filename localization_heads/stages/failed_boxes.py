"""`failures/`: the worst boxes of an evaluation, worst first, drawn one by one and on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from localization_heads.data.images import load_image
from localization_heads.errors import UsageError, WorkError
from localization_heads.evaluation.metrics import THRESHOLDS
from localization_heads.evaluation.scores import Score
from localization_heads.grounding.maps import Grounding, ground_maps
from localization_heads.stages.outcome import Outcome
from localization_heads.stages.run import Run
from localization_heads.store.atomic import replace_folder

if TYPE_CHECKING:
    from PIL import Image

_THUMBNAIL = 3.0  # inches


def worst_outcomes(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """The `count` lowest of the boxes with an IoU below 0.5; of equal ones that with less energy, then file order."""
    failed = [outcome for outcome in outcomes if (outcome.iou or 0.0) < THRESHOLDS[0]]
    return sorted(failed, key=lambda outcome: (outcome.iou or 0.0, _energy(outcome)))[:count]


def _energy(outcome: Outcome) -> float:
    return Score.from_json((outcome.measured or {})["scores"]["heads"][0]).energy


def save_failed_boxes(run: Run, outcomes: Sequence[Outcome]) -> list[Path]:
    """Draw them into `failures/`, which is replaced as a whole; returns the sheet, if there is one.

    Each goes through the model once more: no map is kept while the data set is worked through.
    """
    from localization_heads import figures
    from localization_heads.figures.boxes import BoxPanel
    from localization_heads.figures.overlay import prepare

    folder = run.folder / "failures"
    panels = []
    with replace_folder(folder) as new:
        for number, outcome in enumerate(worst_outcomes(outcomes, run["worst"]), start=1):
            try:
                image = load_image(outcome.sample.image)
            except (UsageError, WorkError):  # gone meanwhile
                continue
            sample, grounding, iou = outcome.sample, _grounding(run, outcome, image), outcome.iou or 0.0
            path = new / f"{number:03d}_{sample.id}.png"
            title = f"{sample.expression} (IoU {iou:.2f})"
            figures.plot_grounding(image, grounding, path, truth=sample.bbox, expression=title)
            small = prepare(image, _THUMBNAIL)
            assert small is not None
            panels.append(BoxPanel(small, image.size, sample.expression, grounding.box, sample.bbox, iou))
        if panels:
            title = f"The worst {len(panels)} of {len(outcomes)} boxes"
            figures.plot_boxes(panels, new / "worst.png", title=title)
    return [folder / "worst.png"] if panels else []


def _grounding(run: Run, outcome: Outcome, image: Image.Image) -> Grounding:
    """The outcome with its map, which was not kept: through the model once more, the box as it was scored."""
    heads = outcome.prediction.heads
    maps = run.lvlm.attend(image, outcome.sample.expression, last_layer=max(layer for layer, _ in heads))
    grounding = ground_maps(maps, heads, run.grounding)
    scored = outcome.prediction
    return replace(grounding, box=scored.bbox or grounding.box, score=scored.score or 0.0)

"""`calibrate`: fit the model that turns the signals of a grounding into probabilities, on entries with ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from localization_heads.evaluation.calibrating import MIN_LABELS, LabelledSignals, has_enough, recalibrate
from localization_heads.evaluation.calibrating import calibrate as fit
from localization_heads.evaluation.confidence import is_right
from localization_heads.grounder import CALIBRATION, load_calibration
from localization_heads.grounding.confidence import Calibration
from localization_heads.grounding.ground import Grounding
from localization_heads.options.groups import SegmenterOptions
from localization_heads.options.programs import FinderOptions
from localization_heads.stages.chunks import AttendedSample
from localization_heads.stages.entries import load_entries, require_truth
from localization_heads.stages.evaluate import complete_box, truth_digest
from localization_heads.stages.ground import ground_all, grounding_settings
from localization_heads.stages.outcome import Outcome, Result
from localization_heads.stages.run import Run
from localization_heads.store.files import RunLock, write_json
from localization_heads.store.journal import ResultLog


class CalibrationResult(NamedTuple):
    result: Result
    calibration: Calibration


def calibrate(run: Run) -> CalibrationResult:
    """Ground every entry whose true box or mask, or absence, is known, and fit on their signals -> `calibration.json`.

    Raises:
        UsageError: too few of the boxes are right, or wrong; or `calibrate_from` was fitted with another recipe.
    """
    source = run.options.calibrate_from
    known = load_calibration(source, "calibrate_from") if source else None
    run = replace(run, options=_options_for_fit(run.options, signals=known is not None and known.needs_model_signals))
    recipe = run.recipe(run.named_heads)
    if known is not None:
        known.check(recipe, source)
    entries = require_truth(load_entries(run), "stage=calibrate", complete_box, or_absent=True)
    with RunLock(run.folder):
        log = ResultLog(run.folder, "calibrate", {**grounding_settings(run), "truth": truth_digest(entries.samples)})
        outcomes, _ = ground_all(run, entries, log, _measure)
        labelled = _label_outcomes(outcomes)
        seed = run.options.random_seed
        fitted = recalibrate(labelled, known, seed=seed) if known else fit(labelled, recipe, seed=seed)
        if fitted.present is None and not labelled.present.all() and not has_enough(labelled.present, MIN_LABELS):
            run.lvlm.note(
                f"the probability of presence needs at least {MIN_LABELS} absent entries and {MIN_LABELS} others; "
                f"there are {int((~labelled.present).sum())} and {int(labelled.present.sum())}: it is left out"
            )
        num_wrong = int((labelled.present & ~labelled.right).sum())
        if num_wrong < MIN_LABELS and known is None:
            run.lvlm.note(
                f"only {num_wrong} boxes of present objects are wrong: at least {MIN_LABELS} would separate right "
                "from wrong boxes better"
            )
        path = run.folder / CALIBRATION
        write_json(path, fitted.to_json())
        log.finish()
        return CalibrationResult(Result([path], entries.sorted_failures(), outcomes), fitted)


def _options_for_fit(options: FinderOptions, *, signals: bool) -> FinderOptions:
    """The options without the work that no signal depends on: figures, and masks that do not make the box."""
    from_map = options.grounding.box_from == "map"
    segmenter = SegmenterOptions(kind="none") if from_map else options.segmenter
    return replace(
        options,
        calibration="none",
        visualize_batch=False,
        segmenter=segmenter,
        signals=options.signals or signals,
    )


def _measure(run: Run, entry: AttendedSample, groundings: Sequence[Grounding]) -> dict[str, Any]:
    grounding = groundings[0]
    return {"signals": dict(grounding.signals), "right": is_right(entry.sample, grounding.box)}


def _label_outcomes(outcomes: Sequence[Outcome]) -> LabelledSignals:
    return LabelledSignals(
        [outcome.measured["signals"] for outcome in outcomes],
        np.array([outcome.measured["right"] for outcome in outcomes], dtype=bool),
        np.array([not outcome.sample.absent for outcome in outcomes], dtype=bool),
        [outcome.sample.image_key for outcome in outcomes],
    )

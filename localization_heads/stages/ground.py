"""`ground`: boxes and masks for images and expressions.

An expression with several phrases is split into one entry per phrase; one figure shows their boxes together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from localization_heads.data.images import ImageSource, list_image_files, load_image
from localization_heads.data.masks import read_mask
from localization_heads.data.phrases import split_phrases
from localization_heads.data.samples import MULTI_IMAGE_ERROR, Sample
from localization_heads.data.sources import (
    PromptImages,
    Together,
    image_at,
    images_of,
    load_prompt_images,
    num_images,
)
from localization_heads.errors import NoHeadError, NothingDoneError, UsageError
from localization_heads.grounding.boxes import crop_around, to_image_pixels
from localization_heads.grounding.confidence import Calibration
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.criteria import HeadStatistics, check_criteria, head_statistics
from localization_heads.heads.head import Head
from localization_heads.options.declaration import active_values
from localization_heads.report.content import Gallery
from localization_heads.stages.chunks import AttendedSample, SecondPass, attend_samples
from localization_heads.stages.entries import Entries, allows_several_images, load_entries
from localization_heads.stages.flow import run_over_samples
from localization_heads.stages.outcome import Outcome, Result, save_predictions
from localization_heads.stages.report import offer_card
from localization_heads.stages.run import Run
from localization_heads.stages.single import image_id
from localization_heads.stages.statistics import append_statistics
from localization_heads.store.files import RunLock
from localization_heads.store.journal import ResultLog
from localization_heads.store.paths import check_id, entry_path
from localization_heads.store.results import Instance, Prediction
from localization_heads.store.statistics import StatisticsStore

if TYPE_CHECKING:
    from localization_heads.figures import DetectedObject


Measure = Callable[[Run, AttendedSample, Sequence[Grounding]], dict[str, Any]]
"""`measure(run, entry, groundings)`: further JSON values for `Outcome.measured`; `groundings` are best first.

A UsageError fails the entry. Like a `ProcessChunk` it is pickled for workers, and gets the worker's `Run`.
"""


def ground(run: Run) -> Result:
    """Boxes and masks for the named images or, without `image_file` and `query`, for every entry of `data_file`."""
    named = bool(run.options.image_file or run.options.query)
    entries = _name_entries(run) if named else load_entries(run)
    single_id = entries.samples[0].id if named and not entries.samples[0].line else None
    entries, groups = split_entries(run, entries)
    with RunLock(run.folder):
        log = ResultLog(run.folder, "ground_one" if single_id else "ground", grounding_settings(run))
        outcomes, figure_paths = ground_all(run, entries, log)
        figure_paths += _draw_groups(run, groups, outcomes)
        path = save_predictions(run, outcomes, entries.sorted_failures(), single_id=single_id)
        log.finish()
        return Result([*figure_paths, path], entries.sorted_failures(), outcomes)


def _name_entries(run: Run) -> Entries:
    """The entries that `image_file` names: one, or one per file of a folder or a pattern, numbered as lines."""
    run.options.require("image_file", "query")
    named, query = run.options.image_file or "", str(run.options.query)
    names = (named,) if isinstance(named, str) else named
    listings = [list_image_files(name) for name in names]  # None for a single image
    files: list[ImageSource] = []
    for name, listing in zip(names, listings, strict=True):
        files += listing or [run.resolve_image(name)]
    if run.options.together or (run.options.together is None and not isinstance(named, str)):
        return _single_entry(run, Together(files), query)
    if listings == [None]:
        return _single_entry(run, run.resolve_image(named), query)
    if run.options.save_id:
        raise UsageError("save_id= names the files of one image; leave it out for several")
    samples = [Sample(file, query, id=image_id(run, file, query), line=n) for n, file in enumerate(files, 1)]
    ids = Counter(sample.id for sample in samples)
    for index, sample in enumerate(samples):
        if ids[sample.id] > 1:
            samples[index] = replace(sample, id=f"{sample.id}_{sample.line}")
    return Entries(samples)


def _single_entry(run: Run, image: ImageSource | Together, query: str) -> Entries:
    id = image_id(run, image, query)
    entry_path(run.attention_folder, id, "_prediction.jsonl")
    load_prompt_images(image)  # a bad image is a usage error here, not a failed entry
    run.lvlm.with_num_images(num_images(image)).prompt(query)
    if isinstance(image, Together) and not allows_several_images(run):
        raise UsageError(f"together=true: {MULTI_IMAGE_ERROR}")
    return Entries([Sample(image, query, id=id)])


def split_entries(run: Run, entries: Entries) -> tuple[Entries, dict[str, list[Sample]]]:
    """The entries, with one entry per phrase (`phrases.by`), and the samples of each split entry by its id.

    The ids of the parts are `<id>_<n>`, counted from 1; they do not inherit the ground truth. An entry fails if the id
    of a part is taken.
    """
    ids = {sample.id for sample in entries.samples}
    split = Entries([], list(entries.failures))
    groups: dict[str, list[Sample]] = {}
    for sample in entries.samples:
        phrases = split_phrases(sample.expression, run.options.phrases.by, run.options.phrases.model)
        if len(phrases) == 1:
            split.samples.append(replace(sample, expression=phrases[0]))
            continue
        with split.skip_on_error(sample, ValueError):
            groups[sample.id] = [_phrase_sample(sample, n, phrase, ids) for n, phrase in enumerate(phrases, start=1)]
            split.samples += groups[sample.id]
    return split, groups


def _phrase_sample(sample: Sample, number: int, phrase: str, ids: set[str]) -> Sample:
    id = check_id(f"{sample.id}_{number}")
    if id in ids:
        raise UsageError(f"its phrase {number} would get the id {id} of another entry; phrases.by=whole does not split")
    return replace(sample, id=id, expression=phrase, bbox=None, mask=None, boxes=(), absent=False)


def ground_all(
    run: Run,
    entries: Entries,
    log: ResultLog,
    measure: Measure | None = None,
    gallery: Gallery | None = None,
    *,
    store: StatisticsStore | None = None,
    every_layer: bool = False,
    measure_runs_model: bool = False,
) -> tuple[list[Outcome], list[Path]]:
    """The outcomes in file order, and the paths of the figures. Outcomes of an interrupted run are read from its log.

    Args:
        measure: called for each entry while its maps are in memory.
        gallery: chooses the entries that may get a card in the report; cards need the maps.
        store: receives the statistics of every head on every sample, as from `find`; needs `every_layer`.
        every_layer: also run the layers above the deepest of the heads.
        measure_runs_model: whether `measure` runs the model.
    """
    outcomes: dict[str, Outcome] = {}
    figure_paths: dict[str, Path] = {}
    order = [sample.id for sample in entries.samples]
    contrast = run.options.grounding.contrast
    calibration = run.calibration_for(run.named_heads)

    def is_done(sample: Sample) -> bool:
        logged = log.get(entries.result_key(sample, contrast))
        outcome = None if logged is None else Outcome.from_json(sample, logged)
        if outcome is None or (store is not None and entries.key(sample) not in store):
            return False
        outcomes[sample.id] = outcome
        return True

    def save(grounded: Sequence[_Grounded]) -> None:
        drawn = []
        for result in grounded:
            sample = result.outcome.sample
            with entries.skip_on_error(sample):
                if result.drawing is not None:
                    figure_paths[sample.id] = _draw(run, result.outcome, *result.drawing)
                drawn.append(result)
        statistics = [(result.outcome.sample, result.statistics) for result in drawn if result.statistics is not None]
        if store is not None and statistics:
            append_statistics(entries, statistics, store)
        log.append(
            [(entries.result_key(result.outcome.sample, contrast), result.outcome.to_json()) for result in drawn]
        )
        outcomes.update({result.outcome.sample.id: result.outcome for result in drawn})

    last_layer = _last_layer(run, every_layer)
    if not run.uses_workers:  # workers load their own
        _ = run.segmenter  # loaded now: a segmenter that cannot be loaded fails the run, not every entry
    run_over_samples(
        run,
        entries,
        entries.samples,
        "ground",
        is_done=is_done,
        process=partial(
            _ground_each,
            heads=run.named_heads,
            calibration=calibration,
            measure=measure,
            draw_ids=set(order[: run.num_figures]),
            gallery=gallery or Gallery(0),
            with_statistics=store is not None,
        ),
        save=save,
        last_layer=last_layer,
        process_runs_model=measure_runs_model,
        second_pass=zoom_pass(run, run.named_heads),
        extra_prompts=run.extra_prompts(run.named_heads, calibration, every_head=every_layer or measure is not None),
    )
    if not outcomes:
        raise NothingDoneError("no entry could be grounded", entries.sorted_failures())
    paths = [figure_paths[id] for id in order if id in figure_paths]
    return [outcomes[id] for id in order if id in outcomes], paths


class _Grounded(NamedTuple):
    """The outcome of an entry, its image and grounding if they will be drawn, and its statistics if they are stored."""

    outcome: Outcome
    drawing: tuple[PromptImages, Grounding] | None = None
    statistics: HeadStatistics | None = None


def _ground_each(
    run: Run,
    entries: Entries,
    attended: Sequence[AttendedSample],
    *,
    heads: Sequence[Head] | None,
    calibration: Calibration | None,
    measure: Measure | None,
    draw_ids: Container[str],
    gallery: Gallery,
    with_statistics: bool,
) -> list[_Grounded]:
    """Ground the entries of a chunk; without `heads`, each with its own. Entries that cannot be grounded fail.

    Args:
        draw_ids: the entries whose images and groundings are returned for drawing.
        gallery: chooses the entries that get a card. Each worker has its own, and the report chooses among all cards.
        with_statistics: also compute the statistics of all heads, about 0.03 s for a model of 1,024 heads.
    """
    grounder = run.grounder(heads, calibration)

    def ground_one(entry: AttendedSample) -> _Grounded:
        statistics = head_statistics(entry.maps.attention, run.options.criteria) if with_statistics else None
        if all_instances := run.options.instances == "all":
            groundings = grounder.ground_all(entry.maps, entry.image, statistics)
        else:
            groundings = [grounder.ground(entry.maps, entry.image, statistics, entry.zoomed_box)]
        grounding = groundings[0]
        outcome = Outcome.of(entry.sample, grounding, groundings if all_instances else None)
        measured = measure(run, entry, groundings) if measure else {}
        index = grounding.image_index
        card = offer_card(gallery, outcome, entry.maps.at(index), grounding, lambda: image_at(entry.image, index))
        # Without the mask, which takes a byte per pixel and is in the outcome as run lengths.
        drawing = (entry.image, _without_masks(grounding)) if entry.sample.id in draw_ids else None
        return _Grounded(replace(outcome, measured=measured, card=card), drawing, statistics)

    grounded = []
    for entry in attended:
        with entries.skip_on_error(entry.sample):
            grounded.append(ground_one(entry))
    return grounded


def _last_layer(run: Run, every_layer: bool) -> int | None:
    """The deepest layer to run: that of the fixed heads; None runs all layers."""
    run.check_named_heads()
    heads = run.named_heads
    if every_layer or not heads:
        check_criteria(run.options.criteria, run.lvlm.num_layers)
        return None
    return max(head.layer for head in heads)


def grounding_settings(run: Run) -> dict[str, Any]:
    """Everything that a box and its confidence depend on besides the sample; part of the key of logged results."""
    options = run.options
    calibration = run.calibration_for(run.named_heads)
    return {
        "confidence": [calibration and calibration.to_json(), options.abstain],
        "model": run.model_settings,
        "heads": [list(head) for head in run.named_heads or ()],
        "options": [options.k, options.batch_size, asdict(options.criteria), asdict(options.grounding)],
        "segmenter": active_values(options.segmenter),
        "boxes": [options.instances, options.instances_by, options.zoom],
        **({"signals": True} if options.signals else {}),
        **({"image_boxes": "each"} if options.image_boxes == "each" else {}),
    }


def zoom_pass(run: Run, heads: Sequence[Head] | None) -> SecondPass | None:
    """The second pass of `zoom=true`; None without it."""
    return partial(_ground_crops, heads=heads) if run.options.zoom else None


def _ground_crops(
    run: Run, entries: Entries, attended: Sequence[AttendedSample], *, heads: Sequence[Head] | None
) -> list[AttendedSample]:
    """The samples with the boxes that the same heads find in crops around the first boxes.

    Every sample of the chunk is asked, even those with stored results: a smaller batch would round differently.
    A sample whose crop cannot be used is left out.
    """
    first = {entry.sample.id: grounding for entry in attended if (grounding := _ground_whole(run, entry, heads))}
    crops = {id: crop for id, grounding in first.items() if (crop := crop_around(grounding))}
    opened = [
        (entry.sample, entry.single_image.crop(crops[entry.sample.id]))
        for entry in attended
        if entry.sample.id in crops
    ]
    last_layer = max((head.layer for grounding in first.values() for head in grounding.heads), default=None)
    cropped = {entry.sample.id: entry for entry in attend_samples(run, entries, opened, last_layer)}
    zoomed = []
    for entry in attended:
        id = entry.sample.id
        if id in cropped:
            grounding = ground_maps(cropped[id].maps, first[id].heads, run.options.grounding)
            box = to_image_pixels(grounding.box, crops[id]) if grounding.cells.any() else None
            zoomed.append(entry._replace(zoomed_box=box))
        elif id not in crops:
            zoomed.append(entry)
    return zoomed


def _ground_whole(run: Run, entry: AttendedSample, heads: Sequence[Head] | None) -> Grounding | None:
    """The grounding on the whole image; None if no head passes in this sample, which `_ground_each` reports."""
    try:
        return ground_maps(entry.maps, run.grounder(heads).heads_of(entry.maps), run.options.grounding)
    except NoHeadError:
        return None


def _draw(run: Run, outcome: Outcome, images: PromptImages, grounding: Grounding) -> Path:
    from localization_heads import figures

    sample, mask = outcome.sample, outcome.prediction.mask
    grounding = _with_mask(grounding, mask)
    path = entry_path(run.attention_folder, sample.id, "_grounding.png")
    if grounding.each:
        predictions = [share.found for share in outcome.prediction.images]
        masks = [None if prediction is None else prediction.mask for prediction in predictions]
        each = [_with_mask(part, mask) for part, mask in zip(grounding.each, masks, strict=True)]
        return run.draw(figures.plot_together, images_of(images), each, path=path, expression=sample.expression)
    image, expression = image_at(images, None), sample.expression
    if instances := outcome.prediction.boxes:
        objects = [_drawn_object(expression, instance, image.size) for instance in instances]
        return run.draw(
            figures.plot_instances,
            image,
            grounding,
            objects,
            path=path,
            truths=sample.true_boxes,
            expression=expression,
        )
    return run.draw(figures.plot_grounding, image, grounding, path=path, truth=sample.bbox, expression=expression)


def _with_mask(grounding: Grounding, mask: Mapping[str, Any] | None) -> Grounding:
    """The grounding with its segmenter's mask, decoded from the run lengths of its prediction."""
    if grounding.mask_from == "map" or mask is None:
        return grounding
    return replace(grounding, refined=read_mask(mask, grounding.image_size))


def _without_masks(grounding: Grounding) -> Grounding:
    each = tuple(replace(part, refined=None) for part in grounding.each)
    return replace(grounding, refined=None, each=each)


def _draw_groups(run: Run, groups: dict[str, list[Sample]], outcomes: Sequence[Outcome]) -> list[Path]:
    """Draw `<id>_grounding.png` for the first entries that were split into phrases."""
    from localization_heads import figures

    predictions = {outcome.sample.id: outcome.prediction for outcome in outcomes}
    paths = []
    for id, parts in list(groups.items())[: run.num_figures]:
        grounded = [part for part in parts if part.id in predictions]
        if not grounded or isinstance(parts[0].image, Together):  # each phrase may be in another image
            continue
        image = load_image(parts[0].image)
        objects = [
            _drawn_object(part.expression, prediction, image.size)
            for part in grounded
            if (prediction := predictions[part.id]).bbox is not None
        ]
        path = entry_path(run.attention_folder, id, "_grounding.png")
        paths.append(run.draw(figures.plot_several, image, objects, path=path))
    return paths


def _drawn_object(phrase: str, prediction: Prediction | Instance, image_size: tuple[int, int]) -> DetectedObject:
    from localization_heads.figures import DetectedObject

    assert prediction.bbox is not None
    mask = None if prediction.mask is None else read_mask(prediction.mask, image_size)
    return DetectedObject(phrase, prediction.bbox, prediction.score or 0.0, mask)

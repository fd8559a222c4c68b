"""`ground`: boxes and masks. Several objects of one query are as many entries, and one figure shows them together."""

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
from localization_heads.options.kinds import as_read
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
    from localization_heads.figures import Found


def second_look(run: Run, heads: Sequence[Head] | None) -> SecondPass | None:
    """What `run_over_samples` asks a second time; None without `zoom=true`."""
    return partial(look_again, heads=heads) if run.options.zoom else None


def look_again(
    run: Run, entries: Entries, attended: Sequence[AttendedSample], *, heads: Sequence[Head] | None
) -> list[AttendedSample]:
    """The chunk with the boxes that the same heads find in crops; an entry whose crop cannot be used fails.

    The whole chunk is asked, whatever is missing of it: another batch would round differently.
    """
    first = {one.sample.id: found for one in attended if (found := _first_look(run, one, heads))}
    crops = {id: crop for id, found in first.items() if (crop := crop_around(found))}
    opened = [
        (one.sample, one.single_image.crop(crops[one.sample.id]))
        for one in attended
        if one.sample.id in crops
    ]
    last_layer = max((head.layer for found in first.values() for head in found.heads), default=None)
    seconds = {one.sample.id: one for one in attend_samples(run, entries, opened, last_layer)}
    looked = []
    for one in attended:
        id = one.sample.id
        if id in seconds:
            found = ground_maps(seconds[id].maps, first[id].heads, run.options.grounding)
            box = to_image_pixels(found.box, crops[id]) if found.cells.any() else None
            looked.append(one._replace(zoomed_box=box))
        elif id not in crops:
            looked.append(one)
    return looked


def _first_look(run: Run, one: AttendedSample, heads: Sequence[Head] | None) -> Grounding | None:
    """What the maps of the whole image say; None where a sample finds no heads of its own, which `work` reports."""
    try:
        return ground_maps(one.maps, run.grounder(heads).heads_of(one.maps), run.options.grounding)
    except NoHeadError:
        return None


Measure = Callable[[Run, AttendedSample, Sequence[Grounding]], dict[str, Any]]
"""Adds to `Outcome.measured` of one grounded entry, with all that was found for it, the best first.
UsageError puts the entry aside.

Like all `ProcessChunk` it is sent to where the model is, and given that place's `Run`.
"""


def ground(run: Run) -> Result:
    """Boxes and masks for one image, or for every entry of `data_file` if no image is named."""
    named = bool(run.options.image_file or run.options.query)
    asked = _named_images(run) if named else load_entries(run)
    alone = named and not asked.samples[0].line
    entries, groups = in_phrases(run, asked)
    with RunLock(run.folder):
        log = ResultLog(run.folder, "ground_one" if alone else "ground", settings(run))
        outcomes, drawn = ground_all(run, entries, log)
        drawn += _draw_groups(run, groups, outcomes)
        alone_id = asked.samples[0].id if alone else None
        path = save_predictions(run, outcomes, entries.sorted_failures(), single_id=alone_id)
        log.finish()
        return Result([*drawn, path], entries.sorted_failures(), outcomes)


def _named_images(run: Run) -> Entries:
    """The image, or those of a folder or a pattern, each an entry with its place as its line."""
    run.options.require("image_file", "query")
    named, query = run.options.image_file or "", str(run.options.query)
    names = (named,) if isinstance(named, str) else named
    held = [list_image_files(name) for name in names]  # by a folder or a pattern
    files: list[ImageSource] = []
    for name, inside in zip(names, held, strict=True):
        files += inside or [run.resolve_image(name)]
    if run.options.together or (run.options.together is None and not isinstance(named, str)):
        return _one_entry(run, Together(files), query)
    if held == [None]:
        return _one_entry(run, run.resolve_image(named), query)
    if run.options.save_id:
        raise UsageError("save_id= names the files of one image; leave it out for several")
    named = [Sample(file, query, id=image_id(run, file, query), line=n) for n, file in enumerate(files, 1)]
    ids = Counter(sample.id for sample in named)
    return Entries([replace(one, id=f"{one.id}_{one.line}") if ids[one.id] > 1 else one for one in named])


def _one_entry(run: Run, image: ImageSource | Together, query: str) -> Entries:
    id = image_id(run, image, query)
    entry_path(run.attention_folder, id, "_prediction.jsonl")
    load_prompt_images(image)  # a wrong image is wrong use here, not a failed entry
    run.lvlm.with_num_images(num_images(image)).prompt(query)
    if isinstance(image, Together) and not allows_several_images(run):
        raise UsageError(f"together=true: {MULTI_IMAGE_ERROR}")
    return Entries([Sample(image, query, id=id)])


def in_phrases(run: Run, entries: Entries) -> tuple[Entries, dict[str, list[Sample]]]:
    """The entries, each one of several phrases (`phrases.by`) in as many parts, and those parts by the entry's id.

    The part's id is `<id>_<n>`, counted from 1. It does not inherit the entry's true box and mask. An entry whose
    parts cannot be named is put aside.
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
            groups[sample.id] = [_part(sample, n, phrase, ids) for n, phrase in enumerate(phrases, start=1)]
            split.samples += groups[sample.id]
    return split, groups


def _part(sample: Sample, number: int, phrase: str, ids: set[str]) -> Sample:
    id = check_id(f"{sample.id}_{number}")
    if id in ids:
        raise UsageError(
            f"its phrase {number} would be called {id}, as another entry is; phrases.by=whole splits nothing"
        )
    return replace(sample, id=id, expression=phrase, bbox=None, mask=None, boxes=(), absent=False)


def _draw_groups(run: Run, groups: dict[str, list[Sample]], outcomes: Sequence[Outcome]) -> list[Path]:
    """`<id>_grounding.png` of the first entries with several phrases."""
    from localization_heads import figures

    done = {outcome.sample.id: outcome.prediction for outcome in outcomes}
    paths = []
    for id, parts in list(groups.items())[: run.num_figures]:
        found = [(part.expression, done[part.id]) for part in parts if part.id in done]
        if not found or isinstance(parts[0].image, Together):  # each phrase may be in another image
            continue
        image = load_image(parts[0].image)
        objects = [_found(expression, one, image.size) for expression, one in found if one.bbox is not None]
        path = entry_path(run.attention_folder, id, "_grounding.png")
        paths.append(run.draw(figures.plot_several, image, objects, path=path))
    return paths


def _found(phrase: str, one: Prediction | Instance, image_size: tuple[int, int]) -> Found:
    from localization_heads.figures import Found

    assert one.bbox is not None
    mask = None if one.mask is None else read_mask(one.mask, image_size)
    return Found(phrase, one.bbox, one.score or 0.0, mask)


class _Grounded(NamedTuple):
    """The outcome of an entry, and its image and grounding if they will be drawn."""

    outcome: Outcome
    drawing: tuple[PromptImages, Grounding] | None = None
    statistics: HeadStatistics | None = None


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
    """Outcomes in file order, and the figures drawn. What a killed run has finished is read from its log.

    Args:
        measure: called for each entry while its maps are there.
        gallery: gives the samples that the report may show a card, made while the maps are there.
        store: gets the statistics of every head of every sample, as `find` keeps them; needs `every_layer`.
        every_layer: run the layers above the deepest head as well.
        measure_runs_model: `measure` asks the model something of its own.
    """
    outcomes: dict[str, Outcome] = {}
    drawn: dict[str, Path] = {}
    order = [sample.id for sample in entries.samples]
    contrast = run.options.grounding.contrast
    calibration = run.calibration_for(run.named_heads)

    def is_done(sample: Sample) -> bool:
        logged = log.get(entries.result_key(sample, contrast))
        found = None if logged is None else Outcome.from_json(sample, logged)
        if found is None or (store is not None and entries.key(sample) not in store):
            return False
        outcomes[sample.id] = found
        return True

    def keep(grounded: Sequence[_Grounded]) -> None:
        kept = []
        for found in grounded:
            sample = found.outcome.sample
            with entries.skip_on_error(sample):
                if found.drawing is not None:
                    drawn[sample.id] = _draw(run, found.outcome, *found.drawing)
                kept.append(found)
        analysed = [(one.outcome.sample, one.statistics) for one in kept if one.statistics is not None]
        if store is not None and analysed:
            append_statistics(entries, analysed, store)
        log.append(
            [(entries.result_key(one.outcome.sample, contrast), one.outcome.to_json()) for one in kept]
        )
        outcomes.update({one.outcome.sample.id: one.outcome for one in kept})

    last_layer = _last_layer(run, every_layer)
    if not run.uses_workers:  # workers load their own
        _ = run.segmenter  # one that cannot be had is not every entry's fault
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
            drawn=set(order[: run.num_figures]),
            gallery=gallery or Gallery(0),
            analyse=store is not None,
        ),
        save=keep,
        last_layer=last_layer,
        process_runs_model=measure_runs_model,
        second_pass=second_look(run, run.named_heads),
        extra_prompts=run.extra_prompts(
            run.named_heads, calibration, every_head=every_layer or measure is not None
        ),
    )
    if not outcomes:
        raise NothingDoneError("no entry could be grounded", entries.sorted_failures())
    return [outcomes[id] for id in order if id in outcomes], [drawn[id] for id in order if id in drawn]


def _ground_each(
    run: Run,
    entries: Entries,
    attended: Sequence[AttendedSample],
    *,
    heads: Sequence[Head] | None,
    calibration: Calibration | None,
    measure: Measure | None,
    drawn: Container[str],
    gallery: Gallery,
    analyse: bool,
) -> list[_Grounded]:
    """Every entry of a chunk that can be grounded; without `heads`, each with its own.

    Args:
        drawn: ids of the entries whose images are handed on.
        gallery: which entries get a card. Each worker keeps its own, and the report chooses among them all.
        analyse: hand on the statistics of all heads, some 0.03 s of work for a model of 1,024 heads.
    """
    grounder = run.grounder(heads, calibration)

    def ground_one(one: AttendedSample) -> _Grounded:
        statistics = head_statistics(one.maps.attention, run.options.criteria) if analyse else None
        if every := run.options.instances == "all":
            found = grounder.ground_all(one.maps, one.image, statistics)
        else:
            found = [grounder.ground(one.maps, one.image, statistics, one.zoomed_box)]
        grounding = found[0]
        outcome = Outcome.of(one.sample, grounding, found if every else None)
        measured = measure(run, one, found) if measure else {}
        place = grounding.image_index
        card = offer_card(gallery, outcome, one.maps.at(place), grounding, lambda: image_at(one.image, place))
        # Without the mask, a byte a pixel, which the outcome has as run lengths.
        drawing = (one.image, _without_masks(grounding)) if one.sample.id in drawn else None
        return _Grounded(replace(outcome, measured=measured, card=card), drawing, statistics)

    grounded = []
    for one in attended:
        with entries.skip_on_error(one.sample):
            grounded.append(ground_one(one))
    return grounded


def settings(run: Run) -> dict[str, Any]:
    """All that a box and its confidence depend on besides its sample."""
    options = run.options
    calibration = run.calibration_for(run.named_heads)
    return {
        "confidence": [calibration and calibration.to_json(), options.abstain],
        "model": run.model_settings,
        "heads": [list(head) for head in run.named_heads or ()],
        "options": [options.k, options.batch_size, asdict(options.criteria), asdict(options.grounding)],
        "segmenter": as_read(options.segmenter),
        "boxes": [options.instances, options.instances_by, options.zoom],
        **({"signals": True} if options.signals else {}),
        **({"image_boxes": "each"} if options.image_boxes == "each" else {}),
    }


def _last_layer(run: Run, every_layer: bool) -> int | None:
    """The deepest layer to run: that of the heads, if they are fixed and not every layer is wanted."""
    run.check_named_heads()
    heads = run.named_heads
    if every_layer or not heads:
        check_criteria(run.options.criteria, run.lvlm.num_layers)
        return None
    return max(head.layer for head in heads)


def _with_mask(grounding: Grounding, mask: Mapping[str, Any] | None) -> Grounding:
    """The grounding with its segmenter's mask, from the run lengths of its prediction."""
    if grounding.mask_from == "map" or mask is None:
        return grounding
    return replace(grounding, refined=read_mask(mask, grounding.image_size))


def _without_masks(grounding: Grounding) -> Grounding:
    each = tuple(replace(one, refined=None) for one in grounding.each)
    return replace(grounding, refined=None, each=each)


def _draw(run: Run, outcome: Outcome, shown: PromptImages, grounding: Grounding) -> Path:
    from localization_heads import figures

    sample, mask = outcome.sample, outcome.prediction.mask
    grounding = _with_mask(grounding, mask)
    path = entry_path(run.attention_folder, sample.id, "_grounding.png")
    if grounding.each:
        found = [share.found for share in outcome.prediction.images]
        masks = [None if one is None else one.mask for one in found]
        each = [_with_mask(one, mask) for one, mask in zip(grounding.each, masks, strict=True)]
        return run.draw(
            figures.plot_together, images_of(shown), each, path=path, expression=sample.expression
        )
    image = image_at(shown, None)
    named: dict[str, Any] = {"truth": sample.bbox, "expression": sample.expression}
    if outcome.prediction.boxes:
        objects = [_found(sample.expression, one, image.size) for one in outcome.prediction.boxes]
        named = {"truths": sample.true_boxes, "expression": sample.expression}
        return run.draw(figures.plot_instances, image, grounding, objects, path=path, **named)
    return run.draw(figures.plot_grounding, image, grounding, path=path, **named)

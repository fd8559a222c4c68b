"""Several objects of one entry: each phrase becomes an entry of its own, and one figure shows them together."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from localization_heads.data.images import load_image
from localization_heads.data.masks import read_mask
from localization_heads.data.phrases import phrases_of
from localization_heads.data.samples import Sample
from localization_heads.errors import BadEntry, NothingDoneError, UsageError
from localization_heads.grounding.ground import Grounding
from localization_heads.heads.criteria import HeadStatistics, head_statistics
from localization_heads.heads.head import Head
from localization_heads.options.kinds import as_read
from localization_heads.report.content import Card, Gallery
from localization_heads.stages.entries import Attended, Entries, select_entries
from localization_heads.stages.find import keep_statistics
from localization_heads.stages.flow import go_through
from localization_heads.stages.outcome import Outcome, outcome_of, save_predictions
from localization_heads.stages.report import Reporter, look
from localization_heads.stages.run import Run, check_criteria
from localization_heads.stages.single import default_id
from localization_heads.store.files import RunLock
from localization_heads.store.journal import ResultLog
from localization_heads.store.paths import check_id, entry_path
from localization_heads.store.statistics import StatisticsStore

if TYPE_CHECKING:
    from PIL import Image


def in_phrases(run: Run, entries: Entries) -> tuple[Entries, dict[str, list[Sample]]]:
    """The entries with each one that has several phrases in as many parts, and those parts by the entry's id.

    The part's id is `<id>_<n>`, counted from 1. The entry's true box and mask are none of any part's. An entry whose
    parts cannot be named is put aside.
    """
    ids = {sample.id for sample in entries.samples}
    samples: list[Sample] = []
    groups: dict[str, list[Sample]] = {}
    failures: list[BadEntry] = list(entries.failures)
    for sample in entries.samples:
        phrases = phrases_of(sample.expression, run.options.phrases.by, run.options.phrases.model)
        if len(phrases) == 1:
            samples.append(replace(sample, expression=phrases[0]))
            continue
        try:
            groups[sample.id] = [_part(sample, n, phrase, ids) for n, phrase in enumerate(phrases, start=1)]
        except (UsageError, ValueError) as error:
            if not sample.line:
                raise
            failures.append(BadEntry(sample.line, sample.id, str(error)))
        samples += groups.get(sample.id, [])
    return Entries(samples, failures), groups


def _part(sample: Sample, number: int, phrase: str, ids: set[str]) -> Sample:
    id = check_id(f"{sample.id}_{number}")
    if id in ids:
        raise UsageError(
            f"its phrase {number} would be called {id}, as another entry is; phrases.by=whole splits nothing"
        )
    return replace(sample, id=id, expression=phrase, bbox=None, mask=None)


def draw_groups(
    run: Run, groups: dict[str, list[Sample]], outcomes: Sequence[Outcome], room: int | None
) -> list[Path]:
    """`<id>_grounding.png` of every entry with several phrases, the first `room` of them; None draws all."""
    from localization_heads import figures

    done = {outcome.sample.id: outcome for outcome in outcomes}
    paths = []
    for id, parts in list(groups.items())[:room]:
        found = [done[part.id] for part in parts if part.id in done]
        if not found:
            continue
        image = load_image(parts[0].image)
        objects = [
            figures.Found(
                outcome.sample.expression,
                outcome.prediction.bbox,
                outcome.prediction.score or 0.0,
                None if outcome.prediction.mask is None else read_mask(outcome.prediction.mask, image.size),
            )
            for outcome in found
            if outcome.prediction.bbox is not None
        ]
        paths.append(entry_path(run.attention_folder, id, "_grounding.png"))
        figure = figures.plot_once(
            figures.plot_several, image, objects, path=paths[-1], always=run.options.show_plot
        )
        if figure and run.options.show_plot:
            figures.show(figure)
    return paths


Given = TypeVar("Given")

Measure = Callable[[Run, Attended, Grounding], dict[str, Any]]
"""What `evaluate` finds out about one grounded entry, as JSON values. UsageError puts the entry aside.

Like all `Work` it is sent to where the model is, and given that place's `Run`.
"""


@dataclass(frozen=True)
class Groundings:
    """What `ground` and `evaluate` end with; `metrics` is empty after `ground`."""

    outcomes: list[Outcome]
    failures: list[BadEntry]
    paths: list[Path]
    metrics: dict[str, Any]


def ground(run: Run) -> Groundings:
    """Boxes and masks for one image, or for every entry of `data_file` if no image is named.

    A query of several phrases is as many entries (`phrases.by`).
    """
    alone = bool(run.options.image_file or run.options.query)
    asked = _one_entry(run) if alone else select_entries(run)
    entries, groups = in_phrases(run, asked)
    with RunLock(run.folder):
        log = ResultLog(run.folder, "ground_one" if alone else "ground", settings(run))
        outcomes, drawn = ground_all(run, entries, log)
        drawn += draw_groups(run, groups, outcomes, drawing_limit(run))
        alone_id = asked.samples[0].id if alone else None
        path = save_predictions(run, outcomes, entries.in_order(), alone=alone_id)
        log.finish()
        return Groundings(outcomes, entries.in_order(), [*drawn, path], {})


def _one_entry(run: Run) -> Entries:
    run.options.require("image_file", "query")
    image = run.image(run.options.image_file)
    id = str(run.options.save_id or default_id(str(image), str(run.options.query)))
    entry_path(run.attention_folder, id, "_prediction.jsonl")
    load_image(image)  # a wrong image is wrong use here, not a failed entry
    run.lvlm.prompt(str(run.options.query))
    return Entries([Sample(image, str(run.options.query), id=id)])


def ground_all(
    run: Run,
    entries: Entries,
    log: ResultLog,
    measure: Measure | None = None,
    report: Reporter | None = None,
    *,
    store: StatisticsStore | None = None,
    every_layer: bool = False,
    measure_runs_model: bool = False,
) -> tuple[list[Outcome], list[Path]]:
    """Outcomes in file order, and the figures drawn. What a killed run has finished is read from its log.

    Args:
        measure: adds to each outcome while its maps are there.
        report: gets a card of every sample that it may show, made while the maps are there. The log keeps the cards:
            a run that was killed goes on to the same page.
        store: gets the statistics of every head of every sample, as `find` keeps them; needs `every_layer`.
        every_layer: run the layers above the deepest head as well.
        measure_runs_model: `measure` asks the model something of its own.
    """
    outcomes: dict[str, Outcome] = {}
    drawn: dict[str, Path] = {}
    order = [sample.id for sample in entries.samples]
    shown = set(order[: drawing_limit(run)])

    def is_done(sample: Sample) -> bool:
        found = _logged(sample, log.get(key := entries.key(sample)))
        if found is None or (store is not None and key not in store):
            return False
        take(found)
        return True

    def take(found: _Grounded) -> None:
        outcomes[found.outcome.sample.id] = found.outcome
        if report:
            report.add(found.outcome, found.card)

    def show(found: _Grounded) -> _Grounded:
        if found.drawing is not None:
            drawn[found.outcome.sample.id] = _draw(run, found.outcome, *found.drawing)
        return found

    def keep(grounded: Sequence[_Grounded]) -> None:
        kept = [one for found in grounded if (one := _or_none(show, found, found.outcome.sample, entries))]
        analysed = [(one.outcome.sample, one.statistics) for one in kept if one.statistics is not None]
        if store is not None and analysed:
            keep_statistics(entries, analysed, store)
        log.append([(entries.key(one.outcome.sample), one.to_json()) for one in kept])
        for one in kept:
            take(one)

    last_layer = _deepest(run, every_layer)
    if not run.is_spread:  # workers load their own
        _ = run.segmenter  # one that cannot be had is not every entry's fault
    go_through(
        run,
        entries,
        entries.samples,
        "ground",
        is_done=is_done,
        work=partial(
            _ground_each,
            heads=run.named_heads,
            measure=measure,
            drawn=shown,
            room=report.room if report else Gallery(0),
            analyse=store is not None,
        ),
        keep=keep,
        last_layer=last_layer,
        work_runs_model=measure_runs_model,
    )
    if not outcomes:
        raise NothingDoneError("no entry could be grounded", entries.in_order())
    return [outcomes[id] for id in order if id in outcomes], [drawn[id] for id in order if id in drawn]


class _Grounded(NamedTuple):
    """What came of an entry, its card if the report may show it, its image and grounding if they will be drawn."""

    outcome: Outcome
    card: Card | None = None
    drawing: tuple[Image.Image, Grounding] | None = None
    statistics: HeadStatistics | None = None

    def to_json(self) -> dict[str, Any]:
        """What a run that goes on needs of it."""
        known = {} if self.card is None else {"card": self.card.to_json()}
        return {**self.outcome.to_json(), **known}


def _logged(sample: Sample, result: Mapping[str, Any] | None) -> _Grounded | None:
    """What the log holds of a sample; None if that is nothing, or nothing that this version has written."""
    try:
        if result is None:
            return None
        card = Card.from_json(result["card"]) if "card" in result else None
        return _Grounded(Outcome.from_json(sample, result), card)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _ground_each(
    run: Run,
    entries: Entries,
    attended: Sequence[Attended],
    *,
    heads: Sequence[Head] | None,
    measure: Measure | None,
    drawn: Container[str],
    room: Gallery,
    analyse: bool,
) -> list[_Grounded]:
    """Every entry of a chunk that can be grounded; without `heads`, each with its own.

    Args:
        drawn: ids of the entries whose images go on.
        room: which entries get a card. Each place that works keeps its own, and the report chooses among them all.
        analyse: the statistics of all heads go on as well, some 0.03 s of work for a model of 1,024 heads.
    """

    grounder = run.grounder(heads)

    def ground_one(one: Attended) -> _Grounded:
        statistics = head_statistics(one.maps.attention, run.options.criteria) if analyse else None
        grounding = grounder.ground(one.maps, one.image, statistics)
        outcome = outcome_of(one.sample, grounding)
        if measure:
            outcome = replace(outcome, measured=measure(run, one, grounding))
        card = look(room, outcome, one.maps, grounding, lambda: one.image)
        # Its mask, a byte a pixel, is in the outcome as run lengths.
        drawing = (one.image, replace(grounding, refined=None)) if one.sample.id in drawn else None
        return _Grounded(outcome, card, drawing, statistics)

    return [found for one in attended if (found := _or_none(ground_one, one, one.sample, entries))]


def settings(run: Run) -> dict[str, Any]:
    """All that a box depends on besides its sample."""
    return {
        "model": run.model_settings,
        "heads": [list(head) for head in run.named_heads or ()],
        "options": [
            run.options.k,
            run.options.batch_size,
            asdict(run.options.criteria),
            asdict(run.options.grounding),
        ],
        "segmenter": as_read(run.options.segmenter),
    }


def _deepest(run: Run, every_layer: bool) -> int | None:
    """With fixed heads the layers above the deepest one are not run, unless they are wanted."""
    heads = run.named_heads
    run.check_named_heads()
    if every_layer or not heads:
        check_criteria(run.options.criteria, run.lvlm.num_layers)
    return max(head.layer for head in heads) if heads and not every_layer else None


def _or_none(
    step: Callable[[Given], _Grounded], given: Given, sample: Sample, entries: Entries
) -> _Grounded | None:
    """None for an entry that has to be put aside; where there is only this one, its error is the run's."""
    try:
        return step(given)
    except UsageError as error:
        if not sample.line:
            raise
        entries.fail(sample, error)
        return None


def drawing_limit(run: Run) -> int | None:
    """Entries that are drawn at most; None draws all."""
    return run.options.visualize_limit if run.options.visualize_batch else 0


def _draw(run: Run, outcome: Outcome, image: Image.Image, grounding: Grounding) -> Path:
    from localization_heads import figures

    sample, mask = outcome.sample, outcome.prediction.mask
    if grounding.mask_from != "map" and mask is not None:
        grounding = replace(grounding, refined=read_mask(mask, grounding.image_size))
    path = entry_path(run.attention_folder, sample.id, "_grounding.png")
    figure = figures.plot_once(
        figures.plot_grounding,
        image,
        grounding,
        path=path,
        truth=sample.bbox,
        expression=sample.expression,
        always=run.options.show_plot,
    )
    if figure and run.options.show_plot:
        figures.show(figure)
    return path

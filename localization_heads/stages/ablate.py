"""`ablate`: what is lost when heads are switched off, and what the answer follows when they are steered.

Every expression is asked again and again: with the first heads of a list changed, with as many random heads of the
same layers, and with those of the highest attention sum. The list is that of `heads=`, best first, and after it all
others in the order in which the label-free criteria rank them on these entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from localization_heads.attention import AttentionMaps, Box
from localization_heads.data.lines import Region, contains_answer, read_expected_answers
from localization_heads.data.samples import Sample
from localization_heads.errors import NothingDoneError, UsageError, WorkError
from localization_heads.evaluation.controls import mean_map
from localization_heads.evaluation.judging import truth_of
from localization_heads.evaluation.scores import Score, Truth, score_box, score_grounding
from localization_heads.experiments.ablation import BEFORE, Condition, Values, conditions, finding
from localization_heads.grounder import check_heads, every_head, known_heads
from localization_heads.grounding.ground import ground_maps
from localization_heads.heads.criteria import check_criteria
from localization_heads.heads.head import Head
from localization_heads.heads.record import HeadRanking
from localization_heads.lvlm.answers.box_formats import BoxFormat
from localization_heads.lvlm.native_box import generate_box, native_box_format
from localization_heads.options.kinds import as_read
from localization_heads.scenes.expressions import Question, make_questions
from localization_heads.scenes.write import write_scene_pairs, write_scenes
from localization_heads.stages.chunks import AttendedSample
from localization_heads.stages.entries import Entries, load_entries
from localization_heads.stages.find import collect_statistics, draw_trials, rank_entries
from localization_heads.stages.flow import run_over_samples
from localization_heads.stages.outcome import Result
from localization_heads.stages.records import open_store
from localization_heads.stages.run import Run
from localization_heads.store.files import RunLock, write_json
from localization_heads.store.journal import ResultLog

MANY = 10_000
RIGHT = 0.5
"""IoU from which a box is right."""
ANSWERS = "answers: "
"""Of a measure: the answers to one kind of question."""


def ablate(run: Run) -> Result:
    """Measure every entry under every condition -> `ablation.json` and `ablation.png`.

    Raises:
        UsageError: nothing can be measured on these entries, or the model lacks a head of the list.
    """
    from localization_heads import figures

    data_file = _data_file(run)
    entries = load_entries(replace(run, options=replace(run.options, data_file=data_file)))
    with RunLock(run.folder):
        check_criteria(run.options.criteria, run.lvlm.num_layers)
        asked = _asked(run, entries, data_file)
        every = _conditions(run, _ranking(run, entries))
        work = Ablation(every, asked)
        log = ResultLog(run.folder, "ablate", _settings(run, work))
        values = _go_through(run, entries, work, log)
        kinds = sorted({name for one in values for name in one[every[0].name] if name.startswith(ANSWERS)})
        what = f"steered by {run.options.ablate.strength:g}" if run.options.ablate.steer else "switched off"
        named = {name: f"answers right, {name.removeprefix(ANSWERS)}" for name in kinds}
        found = finding(every, values, named, what, run.options.random_seed)
        written, path = run.folder / "ablation.json", run.folder / "ablation.png"
        write_json(written, {**found.numbers, "choices": _choices(run)})
        paths = [written, run.draw(figures.plot_ablation, found.numbers, what, path=path)]
        log.finish()
        return Result(paths, entries.sorted_failures(), findings=[found])


def _data_file(run: Run) -> str:
    """Where the entries are; scenes are written now."""
    run.options.require("data_file")
    if run.options.data_file != "scenes":
        return str(run.options.data_file)
    return str((write_scene_pairs if run.options.ablate.steer else write_scenes)(run.options.scenes))


def answers_without(run: Run, entries: Entries, every: Sequence[Condition]) -> list[Values]:
    """The right answers to every entry under every condition, for `experiment=causal`.

    Raises:
        UsageError: an entry has no known answer.
        WorkError: one could not be asked.
    """
    data_file = str(run.options.data_file)
    expected = read_expected_answers(write_scenes(run.options.scenes) if data_file == "scenes" else data_file)
    unknown = next((sample for sample in entries.samples if sample.line not in expected.answers), None)
    if unknown is not None:
        raise UsageError(
            f'experiment=causal: line {unknown.line} ({unknown.id}) has no "answer"; write one into each entry, or use '
            "data=scenes"
        )
    told = {one.id: make_questions(one.expression, expected.answers[one.line]) for one in entries.samples}
    work = Ablation(tuple(every), Asked(told, {}, None, maps=False))
    log = ResultLog(run.folder, "causal", _settings(run, work))
    values = _go_through(run, entries, work, log)
    if len(values) < len(entries.samples):
        raise WorkError(f"experiment=causal: not every entry could be asked: {entries.sorted_failures()[0]}")
    log.finish()
    return values


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Args:
        questions: by entry's id, those whose answer is known.
        regions: by entry's id, where its heads are steered to.
        native: how the model writes boxes; None does not ask for any.
        maps: whether the other heads' maps are scored, where there is a true box or mask.
    """

    questions: Mapping[str, tuple[Question, ...]]
    regions: Mapping[str, tuple[Region, ...]]
    native: BoxFormat | None
    maps: bool


def _asked(run: Run, entries: Entries, data_file: str) -> Asked:
    """What can be measured of what is wanted; entries of which nothing can are put aside."""
    wanted = run.options.ablate.measure
    expected = read_expected_answers(data_file)
    by_line = {sample.line: sample for sample in entries.samples}
    for bad in expected.bad:
        if bad.line in by_line:
            entries.fail(by_line[bad.line], bad.reason)
    if run.options.ablate.steer:
        regions = {
            one.id: expected.regions[one.line] for one in entries.usable if one.line in expected.regions
        }
        asked = Asked({}, regions, None, maps=False)
        need = (
            'regions, such as "regions": [{"bbox": [x0, y0, x1, y1], "answer": "dog"}, ...] (or data=scenes)'
        )
    else:
        native = (
            native_box_format(run.lvlm, run.options.native, by_default=True)
            if wanted in ("boxes", "all")
            else None
        )
        if wanted == "boxes" and native is None:
            native = native_box_format(run.lvlm, True, by_default=True)
        known = {one.id: expected.answers[one.line] for one in entries.usable if one.line in expected.answers}
        told = {
            one.id: make_questions(one.expression, known[one.id]) for one in entries.usable if one.id in known
        }
        asked = Asked(
            told if wanted in ("answers", "all") else {}, {}, native, maps=wanted in ("maps", "all")
        )
        need = 'a known answer ("answer": "red"), bbox or mask'
    for sample in entries.usable:
        boxes = sample.has_truth and (asked.maps or asked.native is not None)
        if not (sample.id in asked.questions or sample.id in asked.regions or boxes):
            entries.fail(sample, f"nothing can be measured: it has no {need}")
    if not entries.usable:
        raise UsageError(f"stage=ablate needs entries with {need}; the first: {entries.sorted_failures()[0]}")
    return asked


def _ranking(run: Run, entries: Entries) -> HeadRanking:
    """The label-free ranking of these entries, whose statistics are kept as `find` keeps them."""
    store = open_store(run)
    collect_statistics(run, entries, entries.usable, store, keep_maps=False)
    return rank_entries(run, entries, draw_trials(run, entries), store)


def _conditions(run: Run, ranking: HeadRanking) -> tuple[Condition, ...]:
    lvlm, options = run.lvlm, run.options
    first, there = options.criteria.exclude_layers, lvlm.attention_modules
    ranked = [head for head in ranking.heads if head.layer >= first and head.layer in there]
    named = _named(run)
    check_heads(named, lvlm.num_layers, lvlm.num_heads)
    run.note_head_conditions()
    listed = tuple(dict.fromkeys([*named, *(head.address for head in ranked)]))
    corner = (0.0, 0.0, 1.0, 1.0)
    with _steered(run, listed, corner) if options.ablate.steer else _switched_off(run, listed):
        pass  # a model that cannot be changed so is not every entry's fault
    by_sum = sorted(ranked, key=lambda head: (-head.attention_sum, head.layer, head.head))
    return conditions(
        listed[: max(options.ablate.counts)],
        [head.address for head in by_sum],
        options.ablate.counts,
        draws=options.ablate.draws,
        num_heads=lvlm.num_heads,
        seed=options.random_seed,
    )


def _named(run: Run) -> tuple[Head, ...]:
    """The heads of `heads=`, all of them, best first; none where `auto` knows none."""
    wanted = run.options.heads
    if wanted == "greedy":
        raise UsageError("heads=greedy: stage=ablate changes fixed heads; write heads=auto or name them")
    if wanted == "auto":
        return known_heads(run.spec.name, run.folder, MANY, run.ready_heads) or ()
    return every_head(wanted)


def _go_through(run: Run, entries: Entries, work: Ablation, log: ResultLog) -> list[Values]:
    """The values of every entry, in file order; of those that a killed run has measured, from its log."""
    found: dict[str, Values] = {}

    def is_done(sample: Sample) -> bool:
        if (logged := log.get(entries.key(sample))) is None:
            return False
        found[sample.id] = logged
        return True

    def keep(measured: Sequence[tuple[Sample, Values]]) -> None:
        log.append([(entries.key(sample), {**values}) for sample, values in measured])
        found.update({sample.id: values for sample, values in measured})

    run_over_samples(
        run,
        entries,
        entries.usable,
        "ablate",
        is_done=is_done,
        process=work,
        save=keep,
        process_runs_model=True,
    )
    if not found:
        raise NothingDoneError("no entry could be measured", entries.sorted_failures())
    return [found[sample.id] for sample in entries.samples if sample.id in found]


@dataclass(frozen=True)
class Ablation:
    """Measures the entries of a chunk under every condition."""

    conditions: tuple[Condition, ...]
    asked: Asked

    def __call__(
        self, run: Run, entries: Entries, attended: Sequence[AttendedSample]
    ) -> list[tuple[Sample, Values]]:
        measured = []
        for one in attended:
            with entries.skip_on_error(one.sample):
                measured.append((one.sample, self._measured(run, one)))
        return measured

    def _measured(self, run: Run, one: AttendedSample) -> Values:
        if regions := self.asked.regions.get(one.sample.id):
            return {
                condition.name: self._steered(run, one, condition, regions) for condition in self.conditions
            }
        truth = truth_of(one.sample, one.single_image.size) if one.sample.bbox or one.sample.mask else None
        return {condition.name: self._without(run, one, condition, truth) for condition in self.conditions}

    def _without(
        self, run: Run, one: AttendedSample, condition: Condition, truth: Truth | None
    ) -> dict[str, float]:
        """The measures of one entry without the heads of a condition."""
        lvlm, sample, found = run.lvlm, one.sample, dict[str, float]()
        with _switched_off(run, condition.heads):
            encoded = lvlm.encode_image(one.single_image)
            if told := self.asked.questions.get(sample.id):
                said = encoded.say([question.text for question in told], run.options.ablate.answer_tokens)
                right = [
                    contains_answer(heard.text, question.answer)
                    for heard, question in zip(said, told, strict=True)
                ]
                found["answers"] = float(np.mean(right))
                if len(told) > 1:
                    kinds = zip(told, right, strict=True)
                    found |= {f"{ANSWERS}{question.kind}": float(ok) for question, ok in kinds}
            if self.asked.native and truth:
                box, _ = generate_box(lvlm, self.asked.native, one.single_image, sample.expression)
                found["boxes"] = float(score_box(box, truth, one.single_image.size).iou >= RIGHT)
            if self.asked.maps and truth:
                (now,) = encoded.attend([sample.expression])
        if self.asked.maps and truth:
            for name, maps in (("", now), (BEFORE, one.maps)):
                score = _of_others(run, maps, condition.heads, truth)
                found[f"maps{name}"], found[f"pointing{name}"] = (
                    float(score.iou >= RIGHT),
                    float(score.pointing),
                )
        return found

    def _steered(
        self, run: Run, one: AttendedSample, condition: Condition, regions: Sequence[Region]
    ) -> dict[str, float]:
        """The share of the regions whose object is named, alone, when the heads are steered there."""
        follows, leaves = [], []
        for region in regions:
            with _steered(run, condition.heads, region.box):
                encoded = run.lvlm.encode_image(one.single_image)
                said = encoded.say([one.sample.expression], run.options.ablate.answer_tokens)[0].text
            there = contains_answer(said, region.answer)
            elsewhere = any(
                contains_answer(said, other.answer) for other in regions if other.answer != region.answer
            )
            follows.append(there and not elsewhere)
            leaves.append(elsewhere and not there)
        return {"follows": float(np.mean(follows)), "leaves": float(np.mean(leaves))}


def _steered(run: Run, heads: Sequence[Head], region: Box) -> AbstractContextManager[None]:
    from localization_heads.lvlm.interventions.steering import steer

    return steer(run.lvlm, heads, region, run.options.ablate.strength)


def _switched_off(run: Run, heads: Sequence[Head]) -> AbstractContextManager[None]:
    from localization_heads.lvlm.interventions.switching import switch_off

    return switch_off(run.lvlm, heads, run.options.ablate.how)


def _of_others(run: Run, maps: AttentionMaps, without: Sequence[Head], truth: Truth) -> Score:
    """The score of the mean map of all heads but those."""
    others = mean_map(maps, run.options.criteria.exclude_layers, without)
    return score_grounding(ground_maps(others, [Head(0, 0)], run.options.grounding), truth)


def _settings(run: Run, work: Ablation) -> dict[str, Any]:
    """All that the values of an entry depend on besides it."""
    options, asked = run.options, work.asked
    return {
        "model": run.model_settings,
        "options": [as_read(options.ablate), options.batch_size, asdict(options.grounding)],
        "exclude_layers": options.criteria.exclude_layers,
        "conditions": {one.name: [list(head) for head in one.heads] for one in work.conditions},
        "questions": {id: [list(question) for question in told] for id, told in asked.questions.items()},
        "regions": {id: [asdict(region) for region in there] for id, there in asked.regions.items()},
        "native": asked.native and asked.native.prompt,
        "maps": asked.maps,
    }


def _choices(run: Run) -> dict[str, Any]:
    """Whatever the numbers depend on, by name."""
    options = run.options
    return {
        **run.lvlm.choices,
        "data_file": str(options.data_file),
        "range": [options.start_index, options.end_index],
        "heads": str(options.heads),
        **{f"ablate.{name}": value for name, value in as_read(options.ablate).items()},
    }

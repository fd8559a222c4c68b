"""`ablate`: what the model loses when heads are switched off, or whether its answers follow heads that are steered.

Every expression is asked under each condition: with the first heads of a list changed, with as many random heads of
the same layers, and with the heads of the highest attention sum. The list is that of `heads=`, best first, followed by
all other heads in the order in which the label-free criteria rank them on these entries.
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
from localization_heads.experiments.ablation import (
    BEFORE,
    Condition,
    Measurements,
    ablation_finding,
    make_conditions,
)
from localization_heads.grounding.ground import ground_maps
from localization_heads.head_choice import known_heads, resolve_all_heads
from localization_heads.heads.criteria import check_criteria
from localization_heads.heads.head import Head, check_heads
from localization_heads.heads.record import HeadRanking
from localization_heads.lvlm.answers.box_formats import BoxFormat
from localization_heads.lvlm.native_box import generate_box, native_box_format
from localization_heads.options.declaration import active_values
from localization_heads.scenes.expressions import Question, make_questions
from localization_heads.scenes.write import write_scene_pairs, write_scenes
from localization_heads.stages.chunks import AttendedSample
from localization_heads.stages.entries import Entries, load_entries
from localization_heads.stages.find import collect_statistics, draw_trials, rank_entries
from localization_heads.stages.flow import run_over_samples
from localization_heads.stages.outcome import Result
from localization_heads.stages.run import Run
from localization_heads.stages.statistics import open_statistics
from localization_heads.store.files import RunLock, write_json
from localization_heads.store.journal import ResultLog

NO_LIMIT = 10_000
"""More heads than any model has."""
CORRECT_IOU = 0.5
ANSWERS = "answers: "
"""Prefix of the measures that count the answers to one kind of question."""


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
        plan = _plan_measurements(run, entries, data_file)
        conditions = _choose_conditions(run, _rank_label_free(run, entries))
        work = Ablation(conditions, plan)
        log = ResultLog(run.folder, "ablate", _settings(run, work))
        measurements = _measure_entries(run, entries, work, log)
        unchanged = conditions[0].name
        measures = {name for values in measurements for name in values[unchanged]}
        question_labels = {
            name: f"answers right, {name.removeprefix(ANSWERS)}"
            for name in sorted(measures)
            if name.startswith(ANSWERS)
        }
        change = f"steered by {run.options.ablate.strength:g}" if run.options.ablate.steer else "switched off"
        finding = ablation_finding(conditions, measurements, question_labels, change, run.options.random_seed)
        numbers_path, figure_path = run.folder / "ablation.json", run.folder / "ablation.png"
        write_json(numbers_path, {**finding.numbers, "choices": _choices(run)})
        figure_path = run.draw(figures.plot_ablation, finding.numbers, change, path=figure_path)
        log.finish()
        return Result([numbers_path, figure_path], entries.sorted_failures(), findings=[finding])


def answers_without(run: Run, entries: Entries, conditions: Sequence[Condition]) -> list[Measurements]:
    """The share of right answers to every entry under every condition, for `experiment=causal`.

    Raises:
        UsageError: an entry has no known answer.
        WorkError: an entry could not be asked.
    """
    data_file = str(run.options.data_file)
    expected = read_expected_answers(write_scenes(run.options.scenes) if data_file == "scenes" else data_file)
    unknown = next((sample for sample in entries.samples if sample.line not in expected.answers), None)
    if unknown is not None:
        raise UsageError(
            f'experiment=causal: line {unknown.line} ({unknown.id}) has no "answer"; write one into each entry, or use '
            "data=scenes"
        )
    by_id = {sample.id: make_questions(sample.expression, expected.answers[sample.line]) for sample in entries.samples}
    work = Ablation(tuple(conditions), MeasurementPlan(by_id, {}, None, maps=False))
    log = ResultLog(run.folder, "causal", _settings(run, work))
    measurements = _measure_entries(run, entries, work, log)
    if len(measurements) < len(entries.samples):
        raise WorkError(f"experiment=causal: not every entry could be asked: {entries.sorted_failures()[0]}")
    log.finish()
    return measurements


def _data_file(run: Run) -> str:
    """The path of `data_file`; scenes are drawn here."""
    run.options.require("data_file")
    if run.options.data_file != "scenes":
        return str(run.options.data_file)
    return str((write_scene_pairs if run.options.ablate.steer else write_scenes)(run.options.scenes))


@dataclass(frozen=True)
class MeasurementPlan:
    """What is measured on each entry.

    Args:
        questions: by entry id, the questions whose answer is known.
        regions: by entry id, the regions that heads are steered to.
        native: how the model writes boxes; None does not ask for any.
        maps: whether the maps of the unchanged heads are scored, on entries with ground truth.
    """

    questions: Mapping[str, tuple[Question, ...]]
    regions: Mapping[str, tuple[Region, ...]]
    native: BoxFormat | None
    maps: bool


def _plan_measurements(run: Run, entries: Entries, data_file: str) -> MeasurementPlan:
    """What `ablate.measure` and the entries allow to measure; entries on which nothing can be measured fail."""
    measure = run.options.ablate.measure
    expected = read_expected_answers(data_file)
    by_line = {sample.line: sample for sample in entries.samples}
    for bad in expected.bad:
        if bad.line in by_line:
            entries.fail(by_line[bad.line], bad.reason)
    if run.options.ablate.steer:
        regions = {
            sample.id: expected.regions[sample.line] for sample in entries.usable if sample.line in expected.regions
        }
        plan = MeasurementPlan({}, regions, None, maps=False)
        needed = 'regions, such as "regions": [{"bbox": [x0, y0, x1, y1], "answer": "dog"}, ...] (or data=scenes)'
    else:
        native = None
        if measure in ("boxes", "all"):
            wanted = True if measure == "boxes" else run.options.native
            native = native_box_format(run.lvlm, wanted, by_default=True)
        by_id = {}
        if measure in ("answers", "all"):
            by_id = {
                sample.id: make_questions(sample.expression, expected.answers[sample.line])
                for sample in entries.usable
                if sample.line in expected.answers
            }
        plan = MeasurementPlan(by_id, {}, native, maps=measure in ("maps", "all"))
        needed = 'a known answer ("answer": "red"), bbox or mask'
    for sample in entries.usable:
        has_boxes = sample.has_truth and (plan.maps or plan.native is not None)
        if not (sample.id in plan.questions or sample.id in plan.regions or has_boxes):
            entries.fail(sample, f"nothing can be measured: it has no {needed}")
    if not entries.usable:
        raise UsageError(f"stage=ablate needs entries with {needed}; the first: {entries.sorted_failures()[0]}")
    return plan


def _rank_label_free(run: Run, entries: Entries) -> HeadRanking:
    """The label-free ranking on these entries; their statistics go into the store of `find`."""
    store = open_statistics(run)
    collect_statistics(run, entries, entries.usable, store, keep_maps=False)
    return rank_entries(run, entries, draw_trials(run, entries), store)


def _choose_conditions(run: Run, ranking: HeadRanking) -> tuple[Condition, ...]:
    lvlm, options = run.lvlm, run.options
    ranked = [
        head
        for head in ranking.heads
        if head.layer >= options.criteria.exclude_layers and head.layer in lvlm.attention_modules
    ]
    named = _named_heads(run)
    check_heads(named, lvlm.num_layers, lvlm.num_heads)
    run.note_head_conditions()
    listed = tuple(dict.fromkeys([*named, *(head.address for head in ranked)]))
    whole_image = (0.0, 0.0, 1.0, 1.0)
    # A model whose heads cannot be changed is an error of the whole run, not of each entry.
    with _steered(run, listed, whole_image) if options.ablate.steer else _switched_off(run, listed):
        pass
    by_sum = sorted(ranked, key=lambda head: (-head.attention_sum, head.layer, head.head))
    return make_conditions(
        listed[: max(options.ablate.counts)],
        [head.address for head in by_sum],
        options.ablate.counts,
        draws=options.ablate.draws,
        heads_per_layer=lvlm.num_heads,
        seed=options.random_seed,
    )


def _named_heads(run: Run) -> tuple[Head, ...]:
    """All heads that `heads=` names, best first; for `auto` the known heads, if there are any."""
    heads = run.options.heads
    if heads == "greedy":
        raise UsageError("heads=greedy: stage=ablate changes fixed heads; write heads=auto or name them")
    if heads == "auto":
        return known_heads(run.spec.name, run.folder, NO_LIMIT, run.ready_heads) or ()
    return resolve_all_heads(heads)


def _measure_entries(run: Run, entries: Entries, work: Ablation, log: ResultLog) -> list[Measurements]:
    """The measurements of every entry, in file order; those of an interrupted run are read from its log."""
    measured: dict[str, Measurements] = {}

    def is_done(sample: Sample) -> bool:
        if (logged := log.get(entries.key(sample))) is None:
            return False
        measured[sample.id] = logged
        return True

    def save(results: Sequence[tuple[Sample, Measurements]]) -> None:
        log.append([(entries.key(sample), {**values}) for sample, values in results])
        measured.update({sample.id: values for sample, values in results})

    run_over_samples(
        run,
        entries,
        entries.usable,
        "ablate",
        is_done=is_done,
        process=work,
        save=save,
        process_runs_model=True,
    )
    if not measured:
        raise NothingDoneError("no entry could be measured", entries.sorted_failures())
    return [measured[sample.id] for sample in entries.samples if sample.id in measured]


@dataclass(frozen=True)
class Ablation:
    """Measures each entry of a chunk under every condition."""

    conditions: tuple[Condition, ...]
    plan: MeasurementPlan

    def __call__(
        self, run: Run, entries: Entries, attended: Sequence[AttendedSample]
    ) -> list[tuple[Sample, Measurements]]:
        measured = []
        for entry in attended:
            with entries.skip_on_error(entry.sample):
                measured.append((entry.sample, self._measure(run, entry)))
        return measured

    def _measure(self, run: Run, entry: AttendedSample) -> Measurements:
        sample = entry.sample
        if regions := self.plan.regions.get(sample.id):
            return {
                condition.name: self._measure_steered(run, entry, condition, regions) for condition in self.conditions
            }
        truth = truth_of(sample, entry.single_image.size) if sample.bbox or sample.mask else None
        return {
            condition.name: self._measure_switched_off(run, entry, condition, truth) for condition in self.conditions
        }

    def _measure_switched_off(
        self, run: Run, entry: AttendedSample, condition: Condition, truth: Truth | None
    ) -> dict[str, float]:
        lvlm, sample, values = run.lvlm, entry.sample, dict[str, float]()
        with _switched_off(run, condition.heads):
            encoded = lvlm.encode_image(entry.single_image)
            if asked := self.plan.questions.get(sample.id):
                answers = encoded.generate([question.text for question in asked], run.options.ablate.answer_tokens)
                correct = [
                    contains_answer(answer.text, question.answer)
                    for answer, question in zip(answers, asked, strict=True)
                ]
                values["answers"] = float(np.mean(correct))
                if len(asked) > 1:
                    for question, is_correct in zip(asked, correct, strict=True):
                        values[f"{ANSWERS}{question.kind}"] = float(is_correct)
            if self.plan.native and truth:
                box, _ = generate_box(lvlm, self.plan.native, entry.single_image, sample.expression)
                values["boxes"] = float(score_box(box, truth, entry.single_image.size).iou >= CORRECT_IOU)
            if self.plan.maps and truth:
                (changed_maps,) = encoded.attend([sample.expression])
        if self.plan.maps and truth:
            for suffix, maps in (("", changed_maps), (BEFORE, entry.maps)):
                score = _score_other_heads(run, maps, condition.heads, truth)
                values[f"maps{suffix}"] = float(score.iou >= CORRECT_IOU)
                values[f"pointing{suffix}"] = float(score.pointing)
        return values

    def _measure_steered(
        self, run: Run, entry: AttendedSample, condition: Condition, regions: Sequence[Region]
    ) -> dict[str, float]:
        """The shares of regions where only the object inside is named (`follows`), or only one outside (`leaves`)."""
        follows, leaves = [], []
        for region in regions:
            with _steered(run, condition.heads, region.box):
                encoded = run.lvlm.encode_image(entry.single_image)
                answer = encoded.generate([entry.sample.expression], run.options.ablate.answer_tokens)[0].text
            inside = contains_answer(answer, region.answer)
            outside = any(contains_answer(answer, other.answer) for other in regions if other.answer != region.answer)
            follows.append(inside and not outside)
            leaves.append(outside and not inside)
        return {"follows": float(np.mean(follows)), "leaves": float(np.mean(leaves))}


def _steered(run: Run, heads: Sequence[Head], region: Box) -> AbstractContextManager[None]:
    from localization_heads.lvlm.interventions.steering import steer

    return steer(run.lvlm, heads, region, run.options.ablate.strength)


def _switched_off(run: Run, heads: Sequence[Head]) -> AbstractContextManager[None]:
    from localization_heads.lvlm.interventions.switching import switch_off

    return switch_off(run.lvlm, heads, run.options.ablate.how)


def _score_other_heads(run: Run, maps: AttentionMaps, without: Sequence[Head], truth: Truth) -> Score:
    """The score of the mean map of all heads but `without`."""
    others = mean_map(maps, run.options.criteria.exclude_layers, without)
    return score_grounding(ground_maps(others, [Head(0, 0)], run.options.grounding), truth)


def _settings(run: Run, work: Ablation) -> dict[str, Any]:
    """Everything that the measurements of an entry depend on besides the entry."""
    options, plan = run.options, work.plan
    return {
        "model": run.model_settings,
        "options": [active_values(options.ablate), options.batch_size, asdict(options.grounding)],
        "exclude_layers": options.criteria.exclude_layers,
        "conditions": {condition.name: [list(head) for head in condition.heads] for condition in work.conditions},
        "questions": {id: [list(question) for question in asked] for id, asked in plan.questions.items()},
        "regions": {id: [asdict(region) for region in regions] for id, regions in plan.regions.items()},
        "native": plan.native and plan.native.prompt,
        "maps": plan.maps,
    }


def _choices(run: Run) -> dict[str, Any]:
    """Every choice that the numbers depend on, by name."""
    options = run.options
    return {
        **run.lvlm.choices,
        "data_file": str(options.data_file),
        "range": [options.start_index, options.end_index],
        "heads": str(options.heads),
        **{f"ablate.{name}": value for name, value in active_values(options.ablate).items()},
    }

"""`experiment`: the figures and tables of the paper from one pass over the data, and the ladder.

`experiment=ladder` is a Hydra multirun over the rungs of `options/experiments.py`, which lead from the box of the
published code to the box of the paper. Each rung runs `evaluate` under its own options and adds a row to the table
(docs/reproducing-the-paper.md).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from localization_heads.attention import AttentionMaps
from localization_heads.data.images import load_image
from localization_heads.data.samples import Sample
from localization_heads.datasets.leakage import check_unseen
from localization_heads.errors import NothingDoneError, UsageError
from localization_heads.evaluation.head_iou import head_hits, map_ious
from localization_heads.evaluation.judging import truth_of
from localization_heads.evaluation.scores import Truth
from localization_heads.experiments.catalogue import EXPERIMENTS
from localization_heads.experiments.causal import ablation_conditions, selection_size
from localization_heads.experiments.paper import Finding, RungResult, ladder_finding
from localization_heads.experiments.study import Study, StudyOptions
from localization_heads.experiments.validation import RecipeScores, Refine, score_recipes
from localization_heads.heads.criteria import check_criteria
from localization_heads.heads.head import Head
from localization_heads.heads.labels import mass_in_truth
from localization_heads.options.groups import SAMS, SegmenterOptions
from localization_heads.stages.ablate import answers_without
from localization_heads.stages.entries import Entries, load_entries, require_truth
from localization_heads.stages.evaluate import evaluate
from localization_heads.stages.find import collect_statistics
from localization_heads.stages.outcome import Result
from localization_heads.stages.run import Run
from localization_heads.stages.sensitivity import average_sensitivity
from localization_heads.stages.statistics import open_ranking_statistics
from localization_heads.store.attention_files import load_attention
from localization_heads.store.files import RunLock, read_json, write_bytes, write_json

log = logging.getLogger(__name__)


def experiment(run: Run) -> Result:
    """Run the experiments that `experiment=` names, with one pass of the model -> `experiments/<name>.*`."""
    chosen = _chosen_names(run)
    entries = load_entries(run)
    needs_truth = any(EXPERIMENTS[name].needs_truth for name in chosen)
    if needs_truth:
        entries = require_truth(entries, "this experiment")
        if run.options.heads != "auto":  # here `auto` finds the heads on the entries themselves
            check_unseen(entries.samples, run.heads_source, allowed=run.options.allow_leakage)
    with RunLock(run.folder):
        check_criteria(run.options.criteria, run.lvlm.num_layers)
        given_heads = _given_heads(run)
        store = open_ranking_statistics(run, entries)
        collect_statistics(run, entries, entries.samples, store, keep_maps=True)
        ground_truth_scores = _score_single_heads(run, entries) if needs_truth else {}
        if not entries.usable:
            raise NothingDoneError("no entry could be used", entries.sorted_failures())
        rows = store.rows([entries.stored_statistics_key(sample, store) for sample in entries.usable])
        study = Study(
            model=run.spec.name,
            data=_data_name(run),
            sums=np.asarray(rows.attention_sum),
            entropies=np.asarray(rows.spatial_entropy(run.options.criteria.entropy)),
            bottom_row=np.asarray(rows.bottom_row_focus),
            given_heads=given_heads,
            segmenter=run.options.segmenter.kind,
            options=_study_options(run),
            sensitivity=average_sensitivity(rows, [1] * len(entries.usable), (store.num_layers, store.num_heads)),
            **ground_truth_scores,
        )
        if "causal" in chosen:
            study = replace(study, answers=_answers_without_heads(run, entries, study))
        findings = _summarize(run, entries, study, chosen)
        paths = [path for finding in findings for path in _write(run, study, finding)]
        return Result(paths, entries.sorted_failures(), findings=findings)


def _study_options(run: Run) -> StudyOptions:
    options = run.options
    return StudyOptions(
        k=options.k,
        num_trials=options.num_trials,
        num_samples=options.num_samples,
        top_n=run.top_n,
        seed=options.random_seed,
        criteria=options.criteria,
        grounding=options.grounding,
        sweeps=options.experiment,
    )


def _chosen_names(run: Run) -> list[str]:
    names: list[str] = list(dict.fromkeys(run.options.experiment.names))
    if not names:
        raise UsageError(f"experiment= is missing: choose one of {', '.join(EXPERIMENTS)}, all or ladder")
    if "ladder" in names:
        raise UsageError("experiment.names: the ladder is a run of its own, experiment=ladder")
    return names


def _given_heads(run: Run) -> tuple[Head, ...] | None:
    """The heads that `heads=` names; None for `auto`, which here means those found on the entries themselves."""
    if run.options.heads == "auto":
        return None
    if run.options.heads == "greedy":
        raise UsageError(
            "heads=greedy: experiments rank fixed heads, and Tab. 5 has the greedy ones; write heads=auto or name them"
        )
    run.check_named_heads()
    return run.named_heads


def _data_name(run: Run) -> str:
    if run.options.data_file == "scenes":
        scenes = run.options.scenes
        return f"scenes, {scenes.split}, {scenes.style or 'mixed'}"
    return Path(str(run.options.data_file)).stem


def _score_single_heads(run: Run, entries: Entries) -> dict[str, Any]:
    """How well each head alone localises each object; entries whose ground truth cannot be read fail."""
    ious, hits, masses, num_masks = [], [], [], 0
    for sample in tqdm(entries.usable, desc="measure", unit="expression", disable=None):
        with entries.skip_on_error(sample):
            maps, truth = _maps_and_truth(run, sample)
            ious.append(map_ious(maps, truth))
            hits.append(head_hits(maps, truth))
            masses.append(mass_in_truth(maps, truth.box, truth.mask))
            num_masks += truth.mask is not None
    if not ious:
        return {}
    stacked = {"ious": np.stack(ious), "hits": np.stack(hits), "masses": np.stack(masses)}
    return {**stacked, "num_masks": num_masks}


def _answers_without_heads(run: Run, entries: Entries, study: Study) -> dict[tuple[str, int], NDArray[np.float64]]:
    """`[ranking, draw]`: the share of right answers to each entry of the second half without those heads."""
    conditions = ablation_conditions(study)
    held_out = Entries(entries.usable[selection_size(study) :])
    measurements = answers_without(run, held_out, conditions)
    return {
        (condition.kind, condition.draw): np.array([values[condition.name]["answers"] for values in measurements])
        for condition in conditions
    }


def _summarize(run: Run, entries: Entries, study: Study, chosen: Sequence[str]) -> list[Finding]:
    """The findings of the experiments; their recipes are scored in one pass over the maps."""
    recipes = {(name, key): recipe for name in chosen for key, recipe in EXPERIMENTS[name].recipes(study).items()}
    scores: Mapping[Any, RecipeScores] = {}
    if recipes:
        samples = entries.usable
        bar = tqdm(samples, desc="score", unit="expression", disable=None)
        scores = score_recipes(recipes, (_maps_and_truth(run, sample) for sample in bar), _refiner(run, samples))
    return [
        EXPERIMENTS[name].find(study, {key: scored for (owner, key), scored in scores.items() if owner == name})
        for name in chosen
    ]


def _refiner(run: Run, samples: Sequence[Sample]) -> Refine | None:
    """Refines a grounding with the segmenter, on the sample's image; None without a segmenter."""
    if run.segmenter is None:
        return None
    return lambda index, grounding: run.grounder(None).refine(grounding, load_image(samples[index].single))


def _maps_and_truth(run: Run, sample: Sample) -> tuple[AttentionMaps, Truth]:
    maps = load_attention(run.attention_file(sample.id))
    return maps, truth_of(sample, maps.image_size)


def _write(run: Run, study: Study, finding: Finding) -> list[Path]:
    """Write `<name>.json` for programs, `<name>.md` for people, and the figure if the experiment has one."""
    from localization_heads import figures

    folder = run.folder / "experiments"
    json_path, page_path = folder / f"{finding.name}.json", folder / f"{finding.name}.md"
    figure_path = folder / f"{finding.name}.{run.options.figure_format}"
    figure = figures.plot_experiment(study, finding, figure_path)
    numbers = {
        "experiment": finding.name,
        "model": study.model,
        "data": study.data,
        "samples": len(study),
        "heads": [list(head) for head in study.heads],
        "reading": finding.reading,
        "numbers": finding.numbers,
    }
    write_json(json_path, numbers)
    write_bytes(page_path, finding.markdown(figure_path.name if figure else None).encode())
    if figure and run.options.show_plot:
        figures.show(figure)
    return [json_path, page_path, *([figure_path] if figure else [])]


METRICS_ONLY: dict[str, Any] = {"visualize_batch": False, "controls": False, "report": False, "worst": 0}
"""The options of a rung, of which only the metrics of its heads are used."""


def climb(run: Run) -> Result:
    """Evaluate one rung -> `ladder/<rung>/metrics.json`, and the table of all rungs so far on the same entries."""
    rung = run.options.rung
    if not rung.step:
        raise UsageError(
            "rung= is missing: experiment=ladder climbs them all by itself; alone, choose one of those --help lists"
        )
    entries = load_entries(run)
    if run.options.heads == "auto":
        # The rung's own run names the heads one by one, so it cannot tell which images they were found on.
        check_unseen(entries.samples, run.heads_source, allowed=run.options.allow_leakage)
    rung_run = _rung_run(run)
    if rung.segmenter == "points" and run.options.segmenter.kind not in SAMS:
        log.warning("rung=points is skipped: segmenter=%s takes no point prompts", run.options.segmenter.kind)
        return Result([], [])
    # Rungs on other data, or on another range of it, are not part of this ladder.
    keys = b"".join(sorted(entries.key(sample) for sample in entries.samples))
    entries_digest = hashlib.sha256(keys).hexdigest()[:16]
    evaluated = evaluate(rung_run)
    result = RungResult(rung.step, rung.name, rung.about, evaluated.metrics)
    write_json(rung_run.folder / "rung.json", {"entries": entries_digest, **result.to_json()})
    finding = ladder_finding(run.spec.name, _read_rungs(rung_run.folder.parent, entries_digest))
    paths = [run.folder / "experiments" / f"ladder{suffix}" for suffix in (".json", ".md")]
    write_json(paths[0], {"experiment": "ladder", "model": run.spec.name, "numbers": finding.numbers})
    write_bytes(paths[1], finding.markdown().encode())
    return Result([rung_run.folder / "metrics.json", *paths], evaluated.failures, findings=[finding])


def _rung_run(run: Run) -> Run:
    """The run of one rung, with a folder of its own and with heads that do not depend on that folder.

    Raises:
        UsageError: `heads=auto` of a model without known heads.
    """
    heads = run.options.heads
    if heads == "auto":
        if not (known := run.named_heads):
            raise UsageError(
                f"heads=auto: no heads are known for {run.spec.name}; find them with stage=find, or name them"
            )
        heads = [f"{layer}-{head}" for layer, head in known]
    segmenter = run.options.segmenter
    if run.options.rung.segmenter == "none":
        segmenter = SegmenterOptions(kind="none")
    elif run.options.rung.segmenter == "points" and segmenter.kind in SAMS:
        segmenter = replace(segmenter, prompt=tuple(dict.fromkeys([*segmenter.prompt, "points"])))
    options = replace(
        run.options,
        heads=heads,
        model=replace(run.options.model, label=run.options.rung.name),
        output_dir=str(run.folder / "ladder"),
        segmenter=segmenter,
        **METRICS_ONLY,
    )
    return Run(options, run.model_choice, run.overrides)


def _read_rungs(folder: Path, entries_digest: str) -> list[RungResult]:
    """The results of all rungs so far on the entries of that digest, in their order."""
    rungs = []
    for path in folder.glob("*/rung.json"):
        try:
            data: Mapping[str, Any] = read_json(path, 1 << 20)
            if data["entries"] == entries_digest:
                rungs.append(RungResult.from_json(data))
        except (UsageError, ValueError, KeyError, TypeError, AttributeError):
            continue  # of an older version, or corrupt: it is replaced when that rung runs again
    return sorted(rungs, key=lambda rung: (rung.step, rung.name))

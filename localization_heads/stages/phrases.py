"""Several objects of one entry: each phrase becomes an entry of its own, and one figure shows them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from localization_heads.data.images import load_image
from localization_heads.data.jsonl import BadEntry
from localization_heads.data.masks import read_mask
from localization_heads.data.phrases import phrases_of
from localization_heads.data.samples import Sample
from localization_heads.errors import UsageError
from localization_heads.stages.entries import Entries
from localization_heads.stages.outcome import Outcome
from localization_heads.stages.run import Run
from localization_heads.store.paths import check_id, entry_path


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
        phrases = phrases_of(sample.expression, run["phrases"]["by"], run["phrases"]["model"])
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
        figure = figures.plot_several(image, objects, paths[-1])
        if run["show_plot"]:
            figures.show(figure)
    return paths

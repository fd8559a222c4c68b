"""`doctor`: shows how a model reads an image and an expression, and judges a checkpoint and its known heads."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads.data.images import load_image
from localization_heads.data.samples import load_samples
from localization_heads.errors import UsageError, WorkError
from localization_heads.heads.criteria import head_statistics
from localization_heads.heads.ranking import add_sensitivity, rank_heads
from localization_heads.heads.record import resting_heads
from localization_heads.heads.sensitivity import mean_sensitivity
from localization_heads.lvlm.extra_prompts import (
    measure_sensitivity,
    measures_sensitivity,
    sensitivity_prompts,
)
from localization_heads.stages.run import Run
from localization_heads.stages.sensitivity import warn_of_disagreement
from localization_heads.stages.single import image_id
from localization_heads.store.files import atomic_write, writable_folder
from localization_heads.store.paths import entry_path

if TYPE_CHECKING:
    from PIL import Image

    from localization_heads.lvlm.checks.doctor import Examination

DEFAULT_IMAGE = "examples/images/cat.jpg"
DEFAULT_EXPRESSION = "the cat"
EXAMPLE_DATA = Path("examples/localization_data.jsonl")
"""The images with expressions that a checkout of this project contains."""


@dataclass(frozen=True)
class DoctorResult:
    """The examination, and its files: the figure of the cells (if their positions are known) and the verdict."""

    examination: Examination
    paths: list[Path]


def doctor(run: Run) -> DoctorResult:
    """Examine the model on `image_file` and `query`, by default the example -> `<id>_doctor.png` and `verdict.json`."""
    source = run.resolve_image(run.options.image_file or DEFAULT_IMAGE)
    expression = str(run.options.query or DEFAULT_EXPRESSION)
    image = load_image(source)
    path = entry_path(run.attention_folder, image_id(run, source, expression), "_doctor.png")
    writable_folder(run.attention_folder)
    run.note_head_conditions()  # loads the model first: that it cannot be loaded is an error, not a finding
    from localization_heads import figures
    from localization_heads.lvlm.checks.doctor import examine

    examination = examine(run.lvlm, image, expression, run.options.doctor.check)
    facts = [*examination.facts, *_sensitivity_facts(run, image, expression)]
    examination = replace(examination, facts=facts)
    paths = []
    if examination.views:
        title = f"{run.lvlm.name}: the cells of its image tokens"
        paths.append(run.draw(figures.plot_cells, image, examination.views, path=path, title=title))
    if run.options.verdict:
        paths.append(_write_verdict(run, examination, image))
    return DoctorResult(examination, paths)


def _sensitivity_facts(run: Run, image: Image.Image, expression: str) -> list[tuple[str, str]]:
    """The sensitivity of the heads on this image, as (name, value); empty if the criteria do not measure it."""
    criteria = run.options.criteria
    if not measures_sensitivity(criteria):
        return []
    maps = run.lvlm.attend(image, expression, extra_prompts=sensitivity_prompts(criteria))
    mirrored = run.lvlm.attend_mirrored(image, expression, maps) if criteria.mirrored else None
    statistics = head_statistics(maps.attention, criteria)
    ranking = rank_heads(
        statistics.attention_sum[None],
        statistics.spatial_entropy[None],
        bottom_row=statistics.bottom_row_focus[None],
        options=criteria,
        top_n=run.top_n,
        num_trials=1,
    )
    shape = (maps.num_layers, maps.num_heads)
    ranking = add_sensitivity(ranking, mean_sensitivity([measure_sensitivity(maps, mirrored)], [1], shape))
    warn_of_disagreement(ranking, run.options.k)
    first = ranking.kept[: run.options.k]
    scores = [f"{head.address} ({head.sensitivity_score:.2f})" for head in first if head.sensitivity_score is not None]
    resting = [str(head.address) for head in resting_heads(ranking)[:10]]
    following = f"{' '.join(scores) or 'none'}: heads by sensitivity score, on this image alone"
    return [("they follow", following), ("they rest", " ".join(resting) or "none")]


def _write_verdict(run: Run, examination: Examination, image: Image.Image) -> Path:
    """Write `verdict.json` into the model's folder."""
    from localization_heads.lvlm.checks.verdict import verdict

    content = verdict(run.lvlm, image, examination)
    content["heads"] = _check_known_heads(run)
    path = run.folder / "verdict.json"
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
    return path


def _check_known_heads(run: Run) -> dict[str, Any]:
    """The checkpoint's known heads compared with a ranking on the example images, or a note why that is impossible."""
    from localization_heads.finding import find_heads
    from localization_heads.lvlm.checks.verdict import recovered_heads

    known = run.lvlm.known_heads
    if not known:
        return {"note": "no heads are published for this checkpoint"}
    samples = load_samples(EXAMPLE_DATA).samples if EXAMPLE_DATA.is_file() else ()
    if not samples:
        return {"note": f"{EXAMPLE_DATA} is not here: run it in a copy of the project"}
    try:
        ranking = find_heads(run.lvlm, samples, criteria=run.options.criteria)
    except (UsageError, WorkError, ValueError) as error:
        return {"note": str(error)}
    return recovered_heads(known, [head.address for head in ranking.kept], len(samples))

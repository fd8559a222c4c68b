"""`doctor`: how a model reads an image and an expression; as a file, a verdict on a checkpoint and its known heads."""

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

EXAMPLE = "examples/images/cat.jpg"
EXPRESSION = "the cat"
"""What `doctor` shows a model if nothing is named."""
SHIPPED = Path("examples/localization_data.jsonl")
"""Images with expressions, of which a checkout of this project has a few."""


@dataclass(frozen=True)
class Examined:
    """What `doctor` found, and the figure of the image tokens' cells (none where their places are not known)."""

    examination: Examination
    paths: list[Path]


def doctor(run: Run) -> Examined:
    """Show how the model reads `image_file` and `query`, or an example -> `<id>_doctor.png`."""
    source, expression = (
        run.resolve_image(run.options.image_file or EXAMPLE),
        str(run.options.query or EXPRESSION),
    )
    image = load_image(source)
    path = entry_path(run.attention_folder, image_id(run, source, expression), "_doctor.png")
    writable_folder(run.attention_folder)
    run.note_head_conditions()  # before the examination, for a model that cannot be loaded is an error of its own
    from localization_heads import figures
    from localization_heads.lvlm.checks.doctor import examine

    found = examine(run.lvlm, image, expression, run.options.doctor.check)
    found = replace(found, facts=[*found.facts, *_sensitivity_rows(run, image, expression)])
    paths = []
    if found.views:
        title = f"{run.lvlm.name}: the cells of its image tokens"
        paths.append(run.draw(figures.plot_cells, image, found.views, path=path, title=title))
    if run.options.verdict:
        paths.append(_write_verdict(run, found, image))
    return Examined(found, paths)


def _sensitivity_rows(run: Run, image: Image.Image, expression: str) -> list[tuple[str, str]]:
    """Sensitivity on one image, as (name, value); nothing if the criteria do not use it. Warns of other first heads."""
    criteria = run.options.criteria
    if not measures_sensitivity(criteria):
        return []
    maps = run.lvlm.attend(image, expression, extra_prompts=sensitivity_prompts(criteria))
    mirrored = run.lvlm.attend_mirrored(image, expression, maps) if criteria.mirrored else None
    found = head_statistics(maps.attention, criteria)
    ranking = rank_heads(
        found.attention_sum[None],
        found.spatial_entropy[None],
        bottom_row=found.bottom_row_focus[None],
        options=criteria,
        top_n=run.top_n,
        num_trials=1,
    )
    shape = (maps.num_layers, maps.num_heads)
    ranking = add_sensitivity(ranking, mean_sensitivity([measure_sensitivity(maps, mirrored)], [1], shape))
    warn_of_disagreement(ranking, run.options.k)
    first = ranking.kept[: run.options.k]
    scores = [
        f"{head.address} ({head.sensitivity_score:.2f})"
        for head in first
        if head.sensitivity_score is not None
    ]
    rest = [str(head.address) for head in resting_heads(ranking)[:10]]
    said = f"{' '.join(scores) or 'none'}: heads by sensitivity score, on this image alone"
    return [("they follow", said), ("they rest", " ".join(rest) or "none")]


def _write_verdict(run: Run, found: Examination, image: Image.Image) -> Path:
    """`verdict.json` in the model's folder."""
    from localization_heads.lvlm.checks.verdict import verdict

    content = verdict(run.lvlm, image, found)
    content["heads"] = _heads(run)
    path = run.folder / "verdict.json"
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
    return path


def _heads(run: Run) -> dict[str, Any]:
    """Known heads, and the first ones of a ranking over the shipped images, if they are here."""
    from localization_heads.finding import find_heads
    from localization_heads.lvlm.checks.verdict import recovered_heads

    known = run.lvlm.known_heads
    if not known:
        return {"note": "no heads are published for this checkpoint"}
    samples = load_samples(SHIPPED).samples if SHIPPED.is_file() else ()
    if not samples:
        return {"note": f"{SHIPPED} is not here: run it in a copy of the project"}
    try:
        ranking = find_heads(run.lvlm, samples, criteria=run.options.criteria)
    except (UsageError, WorkError, ValueError) as error:
        return {"note": str(error)}
    return recovered_heads(known, [head.address for head in ranking.kept], len(samples))

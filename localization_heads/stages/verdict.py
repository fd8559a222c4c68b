"""The file of `stage=doctor verdict=true`: what was found of a checkpoint, its known heads found again or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localization_heads.data.samples import Sample, load_samples
from localization_heads.errors import UsageError, WorkError
from localization_heads.stages.run import Run
from localization_heads.store.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

    from localization_heads.lvlm.checks.doctor import Examination

SHIPPED = Path("examples/localization_data.jsonl")
"""Images with expressions, of which a checkout of this project has a few."""


def write_verdict(run: Run, found: Examination, image: Image.Image) -> Path:
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
    from localization_heads.lvlm.checks.verdict import heads_again

    known = run.lvlm.known_heads
    if not known:
        return {"note": "no heads are published for this checkpoint"}
    samples = _shipped()
    if not samples:
        return {"note": f"{SHIPPED} is not here: run it in a copy of the project"}
    try:
        ranking = find_heads(run.lvlm, samples, criteria=run.options.criteria)
    except (UsageError, WorkError, ValueError) as error:
        return {"note": str(error)}
    return heads_again(known, [head.address for head in ranking.kept], len(samples))


def _shipped() -> Sequence[Sample]:
    if not SHIPPED.is_file():
        return ()
    return load_samples(SHIPPED).samples

"""The ladder: one rung a run, from the published code's box to the paper's, and the table of those climbed so far.

`experiment=ladder` is a Hydra multirun over the presets of `config/rung/`; each is `evaluate` under the options
that the preset sets, so whatever `evaluate` can do, a rung can. Docs: docs/reproducing-the-paper.md.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localization_heads.data.jsonl import BadEntry
from localization_heads.errors import UsageError
from localization_heads.experiments.finding import Finding
from localization_heads.experiments.ladder import Climbed, ladder_finding
from localization_heads.stages.entries import select_entries
from localization_heads.stages.evaluating import evaluate
from localization_heads.stages.run import Run
from localization_heads.stages.unseen import check_unseen
from localization_heads.store.atomic import write_bytes, write_json
from localization_heads.store.json_files import read_json

log = logging.getLogger(__name__)

BARE = {"visualize_batch": False, "controls": False, "report": False, "worst": 0}
"""A rung is the heads' numbers and nothing beside them."""


def climb(run: Run) -> tuple[list[Finding], list[BadEntry], list[Path]]:
    """Evaluate this rung -> `ladder/<rung>/metrics.json`; the table of all rungs on the same entries so far."""
    rung = run["rung"]
    if not rung["step"]:
        raise UsageError(
            "rung= is missing: experiment=ladder climbs them all by itself; alone, choose one of those --help lists"
        )
    if (
        run["heads"] == "auto"
    ):  # the rung's own run names the heads, and then nothing tells what they were found on
        check_unseen(run, select_entries(run).samples)
    own = rung_run(run)
    if rung["segmenter"] == "points" and "prompt" not in run["segmenter"]:
        log.warning("rung=points is left out: segmenter=%s cannot be told points", run["segmenter"]["kind"])
        return [], [], []
    evaluated = evaluate(own)
    entries = _entries_digest(run)
    climbed = Climbed(rung["step"], rung["name"], rung["about"], evaluated.metrics)
    write_json(own.folder / "rung.json", {"entries": entries, **climbed.to_json()})
    finding = ladder_finding(run.spec.name, _rungs(own.folder.parent, entries))
    paths = [run.folder / "experiments" / f"ladder{suffix}" for suffix in (".json", ".md")]
    write_json(paths[0], {"experiment": "ladder", "model": run.spec.name, "numbers": finding.numbers})
    write_bytes(paths[1], finding.markdown().encode())
    return [finding], evaluated.failures, [own.folder / "metrics.json", *paths]


def rung_run(run: Run) -> Run:
    """The same run with a folder of its own, and with heads that do not depend on that folder.

    Raises:
        UsageError: the rung wants the model's known heads, and there are none.
    """
    heads = run["heads"]
    if heads == "auto":
        if not (known := run.named_heads):
            raise UsageError(
                f"heads=auto: no heads are known for {run.spec.name}; find them with stage=find, or name them"
            )
        heads = [f"{layer}-{head}" for layer, head in known]
    model = {**run["model"], "label": run["rung"]["name"]}
    segmenter = dict(run["segmenter"])
    if run["rung"]["segmenter"] == "none":
        segmenter = {"kind": "none"}
    elif run["rung"]["segmenter"] == "points":
        segmenter["prompt"] = list(dict.fromkeys([*segmenter.get("prompt", []), "points"]))
    options = {**run.options, "heads": heads, "model": model, "output_dir": str(run.folder / "ladder")}
    return Run(
        {**options, "segmenter": segmenter, **BARE},
        run.model_choice,
        run.overrides,
    )


def _entries_digest(run: Run) -> str:
    """Stands for the entries: rungs of other data, or of another range, are no part of this ladder."""
    entries = select_entries(run)
    keys = b"".join(sorted(entries.key(sample) for sample in entries.samples))
    return hashlib.sha256(keys).hexdigest()[:16]


def _rungs(folder: Path, entries: str) -> list[Climbed]:
    found = []
    for path in folder.glob("*/rung.json"):
        try:
            data: Mapping[str, Any] = read_json(path, 1 << 20)
            if data["entries"] == entries:
                found.append(Climbed.from_json(data))
        except (UsageError, ValueError, KeyError, TypeError, AttributeError):
            continue  # an older or a broken file: that rung is not shown until it is climbed again
    return sorted(found, key=lambda rung: (rung.step, rung.name))

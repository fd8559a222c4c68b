"""`stage=doctor verdict=true`: a small report on a checkpoint in JSON values, to be attached to an issue."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from localization_heads.errors import UsageError, WorkError, first_line
from localization_heads.heads.head import Head
from localization_heads.lvlm.checks.doctor import Check, Examination, expression_pieces
from localization_heads.lvlm.checks.footprints import LIMIT, UNTRACEABLE, footprint_errors
from localization_heads.lvlm.families.table import FAMILIES
from localization_heads.lvlm.model import LVLM
from localization_heads.version import __version__

EXPRESSIONS = ("the dog", 'the sign "EXIT"', "2nd giraffe from the left")
"""Expressions whose tokens are shown: a plain one, one that ends with a quote, one that begins with a digit."""
SIZE = (420, 300)
"""Size of the image with which the geometry is traced, `(W, H)` in pixels."""
_LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "torchvision")


def verdict(lvlm: LVLM, image: Image.Image, examination: Examination) -> dict[str, Any]:
    """The model, versions, capture check, geometry and tokens, without any text or pixel of the user's.

    Args:
        image: goes into the prompts whose tokens are shown.
        examination: the result of `examine`.
    """
    config = lvlm.model.config
    return {
        "version": 1,
        "well": examination.is_well,
        "model": {
            "name": Path(lvlm.name).name if Path(lvlm.name).is_dir() else lvlm.name,
            "model_type": config.model_type,
            "family_verified": config.model_type in FAMILIES,
            "class": type(lvlm.model).__name__,
            "processor": type(lvlm.processor).__name__,
            "image_processor": type(lvlm.processor.image_processor).__name__,
            "tokenizer": type(lvlm.processor.tokenizer).__name__,
            "layers": lvlm.num_layers,
            "heads": lvlm.num_heads,
            "weights": lvlm.num_parameters,
            "dtype": str(lvlm.model.dtype).removeprefix("torch."),
            "device": lvlm.device.type,
            "fingerprint": lvlm.fingerprint,
            "conv_mode": lvlm.conv_mode,
            "query_token": lvlm.query_token,
        },
        "versions": _versions(),
        "capture": _capture(examination.check),
        "geometry": {"problem": examination.problem, **geometry(lvlm)},
        "tokens": [tokens(lvlm, image, text) for text in EXPRESSIONS],
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"localization-heads": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    versions["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return versions


def _capture(check: Check) -> dict[str, Any]:
    return {"passed": check.passed, "difference": check.difference, "note": check.note}


def geometry(lvlm: LVLM) -> dict[str, Any]:
    """How far the footprints of sampled tokens lie from their cells; `passed` is None if they could not be traced."""
    if reason := UNTRACEABLE.get(lvlm.model.config.model_type):
        return {"passed": None, "note": reason}
    try:
        errors = footprint_errors(lvlm, SIZE)
    except Exception as error:  # an unknown vision tower can fail in any way
        return {"passed": None, "note": f"not traced: {first_line(error, 200)}"}
    views = {
        name: {"cells": len(view), "largest_error": float(abs(view).max()) if len(view) else None}
        for name, view in errors.items()
    }
    largest = [view["largest_error"] for view in views.values() if view["largest_error"] is not None]
    passed = max(largest) < LIMIT if largest else None
    return {"passed": passed, "views": views, "note": f"limit {LIMIT:g} of a cell"}


def tokens(lvlm: LVLM, image: Image.Image, expression: str) -> dict[str, Any]:
    """The tokens of an expression, and those around it in the prompt."""
    try:
        before, own, after = expression_pieces(lvlm, image, expression)
    except (UsageError, WorkError) as error:
        return {"expression": expression, "note": str(error)}
    return {"expression": expression, "before": before[-3:], "own": own, "after": after}


def recovered_heads(known: Sequence[Head], ranked: Sequence[Head], num_samples: int) -> dict[str, Any]:
    """Which of the k known heads are among the first k + 10 of a ranking."""
    first = list(ranked[: len(known) + 10])
    return {
        "samples": num_samples,
        "known": [str(head) for head in known],
        "found": [str(head) for head in first[:10]],
        "again": [str(head) for head in known if head in first],
    }

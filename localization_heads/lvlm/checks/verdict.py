"""What `stage=doctor verdict=true` says of a checkpoint: small, in JSON values, made to be attached to an issue."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from localization_heads.errors import UsageError, WorkError, one_line
from localization_heads.heads.head import Head
from localization_heads.lvlm.checks.doctor import Check, Examination, expression_pieces
from localization_heads.lvlm.checks.footprints import LIMIT, UNTRACEABLE, footprint_errors
from localization_heads.lvlm.families.table import FAMILIES
from localization_heads.lvlm.model import LVLM
from localization_heads.version import __version__

EXPRESSIONS = ("the dog", 'the sign "EXIT"', "2nd giraffe from the left")
"""Whose tokens are shown: a plain one, a closing quote, a digit."""
SIZE = (420, 300)
"""Of the picture with which the geometry is traced."""
_LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "torchvision")


def verdict(lvlm: LVLM, image: Image.Image, found: Examination) -> dict[str, Any]:
    """Family, versions, capture against eager attention, geometry, and tokens; no text or pixel of the user's.

    Args:
        image: for the prompts whose tokens are shown.
        found: what `examine` says of the model.
    """
    config = lvlm.model.config
    return {
        "version": 1,
        "well": found.is_well,
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
        "capture": _capture(found.check),
        "geometry": {"problem": found.problem, **geometry(lvlm)},
        "tokens": [tokens(lvlm, image, text) for text in EXPRESSIONS],
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"localization-heads": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def _capture(check: Check) -> dict[str, Any]:
    return {"passed": check.passed, "difference": check.difference, "note": check.note}


def geometry(lvlm: LVLM) -> dict[str, Any]:
    """How far the footprints of sampled tokens lie from their cells, on this very model; `passed` None if untraced."""
    if reason := UNTRACEABLE.get(lvlm.model.config.model_type):
        return {"passed": None, "note": reason}
    try:
        errors = footprint_errors(lvlm, SIZE)
    except Exception as error:  # a vision tower that nobody has seen fails in its own ways
        return {"passed": None, "note": f"not traced: {one_line(error, 200)}"}
    views = {
        name: {"cells": len(found), "largest_error": float(abs(found).max()) if len(found) else None}
        for name, found in errors.items()
    }
    largest = [view["largest_error"] for view in views.values() if view["largest_error"] is not None]
    passed = max(largest) < LIMIT if largest else None
    return {"passed": passed, "views": views, "note": f"limit {LIMIT:g} of a cell"}


def tokens(lvlm: LVLM, image: Image.Image, expression: str) -> dict[str, Any]:
    """The text of the prompt's tokens around an expression, and which of them are its own."""
    try:
        before, own, after = expression_pieces(lvlm, image, expression)
    except (UsageError, WorkError) as error:
        return {"expression": expression, "note": str(error)}
    return {"expression": expression, "before": before[-3:], "own": own, "after": after}


def heads_again(known: Sequence[Head], found: Sequence[Head], num_samples: int) -> dict[str, Any]:
    """Which of the known heads are among as many first ones of a ranking, and ten more."""
    first = list(found[: len(known) + 10])
    return {
        "samples": num_samples,
        "known": [str(head) for head in known],
        "found": [str(head) for head in first[:10]],
        "again": [str(head) for head in known if head in first],
    }

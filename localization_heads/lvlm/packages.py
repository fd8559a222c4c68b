"""Packages that some checkpoints need besides transformers, and what to say where one is missing or does not fit."""

from __future__ import annotations

import importlib
from importlib import metadata

from localization_heads.errors import WorkError

_LINES = (
    # words in the error of transformers, what needs a package, how to get it; the first that fits
    (("awq",), "its weights are quantized with AWQ", "pip install gptqmodel"),
    (("gptq",), "its weights are quantized with GPTQ", "pip install gptqmodel optimum"),
    (
        ("bitsandbytes",),
        "its weights are quantized with bitsandbytes",
        "pip install 'localization-heads[quantization]'",
    ),
    (
        ("flashattention", "flash_attn", "flash-attn"),
        "it is to run with FlashAttention",
        "pip install flash-attn --no-build-isolation, or write model.attn_implementation=sdpa",
    ),
    (("num2words",), "its processor reads numbers as words", "pip install num2words"),
)


def missing_package(error: Exception) -> str | None:
    """One line about the package that an error of transformers is about, and how to get it; None for other errors."""
    text = str(error).lower()
    if "torchvision" in text:
        return f"its processor needs torchvision; {torchvision_advice()}"
    if not isinstance(error, ImportError):
        return None
    for words, need, way in _LINES:
        if any(word in text for word in words):
            return f"{need}, which needs a package that is missing or too old: {way}"
    return None


def check_torchvision() -> None:
    """See that a torchvision which is installed can be imported: transformers takes it without asking.

    Raises:
        WorkError: names both versions, and the torchvision that fits.
    """
    found = _version("torchvision")
    if found is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # operators that torch lacks, symbols that a library lacks, names that moved
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise WorkError(
            f"torchvision {found} does not fit torch {_version('torch')} ({reason}); {torchvision_advice()}, "
            "or go without: pip uninstall torchvision"
        ) from error


def torchvision_advice() -> str:
    """How to get the torchvision that belongs to the torch which is here, and leave that torch alone."""
    torch = _version("torch") or ""
    if (fitting := fitting_torchvision(torch)) is None:
        return f"install the torchvision that belongs to torch {torch}, with pip's option --no-deps"
    build = torch.partition("+")[2]
    where = f" (from the index that torch came from: build {build})" if build else ""
    return f"pip install --no-deps torchvision=={fitting}{where}"


def fitting_torchvision(torch: str) -> str | None:
    """The release of torchvision that was built for a release of torch; None if the rule is not known to hold.

    >>> fitting_torchvision("2.6.0"), fitting_torchvision("2.9.1+cu128"), fitting_torchvision("1.13.1")
    ('0.21.0', '0.24.1', None)
    """
    parts = torch.partition("+")[0].split(".")
    if len(parts) != 3 or parts[0] != "2" or not all(part.isdecimal() for part in parts):
        return None
    return f"0.{int(parts[1]) + 15}.{parts[2]}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

"""Where a checkpoint comes from, a folder or the hub, and what is said when it cannot be had or read.

Packages that are missing or do not fit each other are among the reasons.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from localization_heads.data.network import NetworkSettingError, open_client
from localization_heads.errors import UsageError, WorkError, first_line
from localization_heads.lvlm.checkpoints.files import check_files
from localization_heads.store.files import read_json
from localization_heads.store.paths import local_path

MAX_SETTINGS = 1 << 20
"""Bytes of a file of settings for videos."""


def resolve_source(name: str, shown: str, otherwise: str) -> str:
    """What `from_pretrained` is given: a local folder, whose files are checked, or a hub id.

    Args:
        shown: option and value, which the messages begin with.
        otherwise: what to write instead, for the message about a name that is neither.

    Raises:
        UsageError: no such folder and no hub id, or a folder that holds no model.
        WorkError: a file of the folder is a pointer of Git LFS.
    """
    folder = local_path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{shown}: the folder holds no config.json, so it is no saved model")
        check_files(folder, shown)
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(f"{shown}: no such folder, and no Hugging Face id (owner/name) either; {otherwise}")
    return name


def reads_local_files_only(source: str) -> bool:
    """Whether nothing is to be asked of the hub: a local folder, or no way to the hub."""
    return Path(source).is_dir() or hub_unreachable_reason() is not None


def checkpoint_folder(source: str) -> Path | None:
    """Where the files are: a local folder, or the hub cache's folder of an id; None if the cache lacks it."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source)
    found = try_to_load_from_cache(source, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def video_settings(source: str) -> dict[str, Any]:
    """What a checkpoint says of videos: in its processor's file, or in one of its own; empty where it says nothing.

    Raises:
        UsageError: the file is no JSON, or too large for such a file; names it.
    """
    from transformers.utils.hub import cached_file

    for name, part in (("processor_config.json", "video_processor"), ("video_preprocessor_config.json", "")):
        path = cached_file(
            source,
            name,
            local_files_only=reads_local_files_only(source),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        content = read_json(Path(path), MAX_SETTINGS) if path else {}
        found = content.get(part) if part and isinstance(content, dict) else content
        if isinstance(found, dict) and found:
            return found
    return {}


@cache
def hub_unreachable_reason() -> str | None:
    """Why the hub cannot be asked; None if it can.

    Without this, every file is asked for many times before the error.
    """
    import httpx
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE=1 is set"
    try:
        with open_client(timeout=10) as client:
            client.head(constants.ENDPOINT)
    except NetworkSettingError as error:
        return str(error)
    except httpx.ConnectError as error:
        return f"no connection: {first_line(error)}"
    except (httpx.HTTPError, httpx.InvalidURL):
        pass  # slow or odd, but there: the hub's own client will say more
    return None


@contextmanager
def checkpoint_errors(source: str, shown: str, offline: str) -> Iterator[None]:
    """Raises WorkError, in one line that says what to do, for the many ways in which `from_pretrained` fails.

    Args:
        source: what `from_pretrained` is given.
        shown: option and value, which the messages begin with.
        offline: what works without a network.
    """
    try:
        yield
    except (UsageError, WorkError):
        raise
    except OSError as error:
        if Path(source).is_dir():
            raise WorkError(f"{shown} cannot be read: {first_line(error)}") from error
        raise WorkError(
            f"{shown} is neither a folder here nor to be had from the Hugging Face hub "
            f"({hub_unreachable_reason() or first_line(error)}). Without a network: {offline}"
        ) from error
    except Exception as error:  # broken weights and configs raise anything
        raise WorkError(f"{shown} cannot be loaded: {missing_package(error) or _reason(error)}") from error


def _reason(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):
        return "the sizes in config.json are not those of its weights"
    return first_line(error)


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
    (
        ("timm",),
        "its vision tower is timm's",
        "pip install --no-deps timm, and the torchvision that it imports",
    ),
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
    """Check that an installed torchvision can be imported, because transformers uses it wherever it is installed.

    Raises:
        WorkError: names both versions, and the torchvision that fits.
    """
    found = _version("torchvision")
    if found is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # operators that torch lacks, symbols that a library lacks, names that moved
        raise WorkError(
            f"torchvision {found} does not fit torch {_version('torch')} ({first_line(error)}); "
            f"{torchvision_advice()}, or go without: pip uninstall torchvision"
        ) from error


def torchvision_advice() -> str:
    """How to install the torchvision that fits the installed torch, without replacing that torch."""
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

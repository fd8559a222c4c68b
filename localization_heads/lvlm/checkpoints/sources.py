"""Where a checkpoint comes from, a local folder or the Hugging Face hub, and why it cannot be downloaded or read.

Failures of `from_pretrained`, including those caused by missing or incompatible packages, become one-line errors that
say what to do.
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

MAX_VIDEO_SETTINGS_BYTES = 1 << 20


def resolve_source(name: str, option: str, alternative: str) -> str:
    """Return what `from_pretrained` takes for a name: a local folder, after checking its files, or a hub id.

    Args:
        option: the option and its value (`model.name=...`), with which error messages begin.
        alternative: what to write instead, for the message about a name that is neither.

    Raises:
        UsageError: there is no such folder and it is no hub id, or the folder holds no model.
        WorkError: a file of the folder is a Git LFS pointer.
    """
    folder = local_path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{option}: the folder holds no config.json, so it is no saved model")
        check_files(folder, option)
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(f"{option}: no such folder, and no Hugging Face id (owner/name) either; {alternative}")
    return name


def reads_local_files_only(source: str) -> bool:
    """Whether to load without the hub: from a local folder or, where the hub cannot be reached, from its cache."""
    return Path(source).is_dir() or hub_unreachable_reason() is not None


def checkpoint_folder(source: str) -> Path | None:
    """Return the folder of the files: a local one, or that of a hub id in the hub's cache; None if not cached."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source)
    path = try_to_load_from_cache(source, "config.json")
    return Path(path).parent if isinstance(path, str) else None


def video_settings(source: str) -> dict[str, Any]:
    """Return a checkpoint's settings for videos, from its processor's file or their own; empty if it has none.

    Raises:
        UsageError: the file is not valid JSON, or too large.
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
        settings = read_json(Path(path), MAX_VIDEO_SETTINGS_BYTES) if path else {}
        if part and isinstance(settings, dict):
            settings = settings.get(part)
        if isinstance(settings, dict) and settings:
            return settings
    return {}


@cache
def hub_unreachable_reason() -> str | None:
    """Return why the hub cannot be reached, or None if it can. Asked once per process.

    Otherwise transformers would retry the download of every file before failing.
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
        pass  # slow or misconfigured, but reachable: the hub's own client reports the details
    return None


@contextmanager
def checkpoint_errors(source: str, option: str, offline_advice: str) -> Iterator[None]:
    """Turn every failure of `from_pretrained` into a WorkError of one line that says what to do.

    Args:
        source: the folder or hub id that is loaded.
        option: the option and its value, with which the messages begin.
        offline_advice: what to do without a network.
    """
    try:
        yield
    except (UsageError, WorkError):
        raise
    except OSError as error:
        if Path(source).is_dir():
            raise WorkError(f"{option} cannot be read: {first_line(error)}") from error
        raise WorkError(
            f"{option} is neither a local folder nor available from the Hugging Face hub "
            f"({hub_unreachable_reason() or first_line(error)}). Without a network: {offline_advice}"
        ) from error
    except Exception as error:  # broken weights and configurations raise errors of any type
        raise WorkError(f"{option} cannot be loaded: {_load_failure(error)}") from error


def _load_failure(error: Exception) -> str:
    if advice := missing_package(error):
        return advice
    if "ignore_mismatched_sizes" in str(error):
        return "the sizes in config.json are not those of its weights"
    return first_line(error)


_MISSING_PACKAGES = (
    # (words in transformers' error, what needs the package, how to install it); the first match counts
    (("awq",), "its weights are quantized with AWQ", "pip install gptqmodel"),
    (("gptq",), "its weights are quantized with GPTQ", "pip install gptqmodel optimum"),
    (
        ("bitsandbytes",),
        "its weights are quantized with bitsandbytes",
        "pip install 'localization-heads[quantization]'",
    ),
    (
        ("flashattention", "flash_attn", "flash-attn"),
        "model.attn_implementation asks for FlashAttention",
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
    """Return one line about the missing package behind an error of transformers; None for other errors."""
    text = str(error).lower()
    if "torchvision" in text:
        return f"its processor needs torchvision; {torchvision_advice()}"
    if not isinstance(error, ImportError):
        return None
    for words, reason, remedy in _MISSING_PACKAGES:
        if any(word in text for word in words):
            return f"{reason}, which needs a package that is missing or too old: {remedy}"
    return None


def check_torchvision() -> None:
    """Check that torchvision, if installed, can be imported: transformers uses it wherever it is installed.

    Raises:
        WorkError: names both versions and the matching torchvision.
    """
    installed = _version("torchvision")
    if installed is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # an operator, a symbol of a library or a name that this torch lacks
        raise WorkError(
            f"torchvision {installed} does not fit torch {_version('torch')} ({first_line(error)}); "
            f"{torchvision_advice()}, or go without: pip uninstall torchvision"
        ) from error


def torchvision_advice() -> str:
    """Return how to install the torchvision that matches the installed torch, without replacing that torch."""
    torch = _version("torch") or ""
    if (matching := matching_torchvision(torch)) is None:
        return f"install the torchvision that belongs to torch {torch}, with pip's option --no-deps"
    build = torch.partition("+")[2]
    where = f" (from the index that torch came from: build {build})" if build else ""
    return f"pip install --no-deps torchvision=={matching}{where}"


def matching_torchvision(torch: str) -> str | None:
    """Return the release of torchvision that was built for a release of torch; None for versions other than 2.x.y.

    >>> matching_torchvision("2.6.0"), matching_torchvision("2.9.1+cu128"), matching_torchvision("1.13.1")
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

"""Where a checkpoint comes from, a folder or the hub, and what is said when it cannot be had or read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from localization_heads.data.network import NetworkSettingError, open_client
from localization_heads.errors import UsageError, WorkError, first_line
from localization_heads.lvlm.checkpoint import check_files, missing_package
from localization_heads.store.paths import local_path


def source_of(name: str, shown: str, otherwise: str) -> str:
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


def only_here(source: str) -> bool:
    """Whether nothing is to be asked of the hub: a local folder, or no way to the hub."""
    return Path(source).is_dir() or hub_trouble() is not None


def checkpoint_folder(source: str) -> Path | None:
    """Where the files are: a local folder, or the hub cache's folder of an id; None if the cache lacks it."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source)
    found = try_to_load_from_cache(source, "config.json")
    return Path(found).parent if isinstance(found, str) else None


@cache
def hub_trouble() -> str | None:
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
def reading_errors(source: str, shown: str, offline: str) -> Iterator[None]:
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
            f"({hub_trouble() or first_line(error)}). Without a network: {offline}"
        ) from error
    except Exception as error:  # broken weights and configs raise anything
        raise WorkError(f"{shown} cannot be loaded: {missing_package(error) or _reason(error)}") from error


def _reason(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):
        return "the sizes in config.json are not those of its weights"
    return first_line(error)

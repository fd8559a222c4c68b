"""The heads that `heads=` names: a list, a heads.json, a ready list, a hub repository, or `auto`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from localization_heads.errors import UsageError
from localization_heads.heads.head import Head, find_duplicate
from localization_heads.heads.ready import NONE_READY, FoundWith, ReadyHeads, ready_lists
from localization_heads.heads.record import HeadRanking
from localization_heads.hub import is_repository, load_heads
from localization_heads.store.results import is_ranking, load_head_list, load_ranking

log = logging.getLogger(__name__)


def choose_heads(
    choice: Any, k: int, model: str, folder: Path, ready: ReadyHeads | None = None
) -> tuple[Head, ...] | None:
    """The heads that `heads=` asks for, best first, or None if each sample has to pick its own.

    Args:
        choice: `auto`, `greedy`, a list of names, a heads.json, a ready list or a hub repository.
        model: whose heads they are.
        folder: of that model's results, with its heads.json.
        ready: the ready list that fits the model and its prompt, for `auto`.

    Raises:
        UsageError: a file or a name that cannot be used.
    """
    if choice == "greedy":
        return None
    if choice != "auto":
        return resolve_heads(choice, k)
    known = known_heads(model, folder, k, ready)
    if not known:
        log.warning("no heads are known for %s: each sample picks its own", model)
    elif len(known) < k:
        log.warning("k=%d: only %d heads are known for %s, and these are taken", k, len(known), model)
    return known


def known_heads(model: str, folder: Path, k: int, ready: ReadyHeads | None) -> tuple[Head, ...] | None:
    """The heads of `heads=auto`: those of the ready list that fits, else the best of the heads.json in the folder.

    None if there is neither; a heads.json of another model does not count. If a ready list exists but does not fit, a
    warning says why.
    """
    if ready and ready.advice:
        log.warning("heads=auto: %s", ready.advice)
    if ready and ready.heads:
        return ready.heads[:k]
    ranking = _own_ranking(model, folder)
    return tuple(head.address for head in ranking.kept[:k]) or None if ranking else None


def _own_ranking(model: str, folder: Path) -> HeadRanking | None:
    """The heads.json in a model's folder, if it is of this model."""
    path = folder / "heads.json"
    ranking = load_ranking(path) if path.is_file() else None
    return ranking if ranking and ranking.model == model else None


def resolve_heads(value: Any, k: int) -> tuple[Head, ...]:
    """The heads of a list such as `[14-24, 14-13]` or of one such name; the first k of a file, repository or list.

    Raises:
        UsageError: for a file or a name that cannot be used, and for a file or list with fewer than k heads.
    """
    heads = resolve_all_heads(value)
    is_ranked = isinstance(value, str) and (value.endswith(".json") or value in ready_lists() or is_repository(value))
    if is_ranked and len(heads) < k:
        raise UsageError(f"k={k}: {value} lists only {len(heads)} heads")
    return heads[:k] if is_ranked else heads


def resolve_all_heads(value: Any) -> tuple[Head, ...]:
    """All heads of a list such as `[14-24, 14-13]`, a name, a heads.json, a ready list or a repository, best first."""
    if isinstance(value, str) and value.endswith(".json"):
        return tuple(load_head_list(value))
    if isinstance(value, str) and value in ready_lists():
        return ready_lists()[value].heads
    if isinstance(value, str) and is_repository(value):
        return tuple(head.address for head in load_heads(value).kept)
    names = value if isinstance(value, (list, tuple)) else [value]
    try:
        heads = tuple(Head.parse(str(name)) for name in names)
    except ValueError as error:
        raise UsageError(
            f"heads={value}: {error}; or write auto, greedy, the path of a heads.json, a hub repository user/repo, or "
            f"a ready list ({', '.join(ready_lists())})"
        ) from error
    if not heads:
        raise UsageError("heads=[] names no head; write auto, or a list such as [14-24,14-13,14-26]")
    if duplicate := find_duplicate(heads):
        raise UsageError(f"heads names {duplicate} twice: name each head once")
    return heads


def heads_source(
    choice: Any, model: str = "", folder: Path | None = None, ready: ReadyHeads = NONE_READY
) -> Path | str | None:
    """The heads.json that `heads=` takes its heads from: a path, or a hub repository; None for other heads.

    Arguments as of `choose_heads`; those after the first are only needed for `auto`.
    """
    if isinstance(choice, str) and choice.endswith(".json"):
        return Path(choice) if is_ranking(choice) else None
    if isinstance(choice, str) and is_repository(choice):
        return choice
    if choice != "auto" or folder is None or ready.heads:
        return None
    return folder / "heads.json" if _own_ranking(model, folder) else None


def heads_found_with(
    choice: Any, model: str = "", folder: Path | None = None, ready: ReadyHeads = NONE_READY
) -> FoundWith | None:
    """How the heads of `heads=` were found; None if that is unknown. Arguments as of `heads_source`."""
    if (source := heads_source(choice, model, folder, ready)) is not None:
        return load_heads(source).found_with
    if isinstance(choice, str) and choice in ready_lists():
        return ready_lists()[choice].found_with
    return ready.of.found_with if choice == "auto" and ready.of else None

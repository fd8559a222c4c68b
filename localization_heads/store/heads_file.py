"""`heads.json` and `heads.csv`: the ranking on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.heads.ranking import HeadRanking
from localization_heads.heads.scores import read_scores
from localization_heads.store.atomic import write_csv, write_json
from localization_heads.store.json_files import read_json

_LARGEST = 32 << 20  # bytes; 100,000 heads take 20 MB


def save_ranking(ranking: HeadRanking, folder: Path) -> tuple[Path, Path]:
    """Write `heads.json` (the heads kept) and `heads.csv` (all of them) into `folder`."""
    json_path, csv_path = folder / "heads.json", folder / "heads.csv"
    write_csv(csv_path, HeadRanking.CSV_HEADER, ranking.csv_rows())
    write_json(json_path, ranking.to_json())
    return json_path, csv_path


def load_ranking(path: str | Path) -> HeadRanking:
    """Read a `heads.json`. Raises UsageError, naming the file, for anything else."""
    data = _read(Path(path))
    try:
        return HeadRanking.from_json(data)
    except UsageError as error:
        raise UsageError(f"heads={path}: {error}") from error


def is_ranking(path: str | Path) -> bool:
    """Whether a file holds a ranking, and not another tool's scores. UsageError if it is no JSON file."""
    data = _read(Path(path))
    return isinstance(data, dict) and "heads" in data


def load_head_list(path: str | Path) -> list[Head]:
    """Heads, best first, from a `heads.json` or from another tool's scores (`heads.scores`).

    Raises:
        UsageError: naming the file, for anything else.
    """
    if is_ranking(path):
        return [head.address for head in load_ranking(path).kept]
    try:
        return [head for head, _ in read_scores(_read(Path(path)))]
    except UsageError as error:
        raise UsageError(f"heads={path}: {error}") from error


def _read(path: Path) -> Any:
    """The JSON value in a file of bounded size."""
    try:
        return read_json(path, _LARGEST)
    except UsageError as error:
        raise UsageError(f"heads={error}") from error

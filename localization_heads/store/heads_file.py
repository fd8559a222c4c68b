"""`heads.json` and `heads.csv`: the ranking on disk."""

from __future__ import annotations

import json
from pathlib import Path

from localization_heads.errors import UsageError
from localization_heads.heads.ranking import HeadRanking
from localization_heads.store.atomic import write_csv, write_json

_LARGEST = 64 << 20  # bytes; 100,000 heads take 20 MB


def save_ranking(ranking: HeadRanking, folder: Path) -> tuple[Path, Path]:
    """Write `heads.json` (the heads kept) and `heads.csv` (all of them) into `folder`."""
    json_path, csv_path = folder / "heads.json", folder / "heads.csv"
    write_csv(csv_path, HeadRanking.CSV_HEADER, ranking.csv_rows())
    write_json(json_path, ranking.to_json())
    return json_path, csv_path


def load_ranking(path: str | Path) -> HeadRanking:
    """Read a `heads.json`. Raises UsageError, naming the file, for anything else."""
    path = Path(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"heads={path}: {path.stat().st_size >> 20} MB is too large for a heads.json")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"heads={path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"heads={path}: not a JSON file ({error})") from error
    try:
        return HeadRanking.from_json(data)
    except UsageError as error:
        raise UsageError(f"heads={path}: {error}") from error

"""Tables on disk, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localization_heads.store.atomic import atomic_write


def write_parquet(path: Path, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as parquet; what a row does not name is null.

    Args:
        columns: name -> kind: `text`, `number` (float64), `whole` (int64), or `texts`, `numbers` for lists of them.
    """
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"text": pa.string(), "number": pa.float64(), "whole": pa.int64()}
    kinds |= {"texts": pa.list_(pa.string()), "numbers": pa.list_(pa.float64())}
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    arrays = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
    with atomic_write(path) as file:
        parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), file)

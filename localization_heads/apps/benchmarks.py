"""What `evaluate` prints of a benchmark's own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from localization_heads.errors import printable


def protocol_table(protocol: Mapping[str, Any]) -> Table | None:
    """The block `protocol` of `metrics.json`: each number with its 95 % interval; None where it has no number."""
    numbers = [name for name in protocol if f"{name}_interval" in protocol]
    if not numbers:
        return None
    table = Table(title=f"Protocol {protocol['name']}", caption=escape(str(protocol["right"])))
    table.add_column("", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 %", justify="right", no_wrap=True)
    for name in numbers:
        low, high = protocol[f"{name}_interval"]
        shown = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        table.add_row(escape(printable(name)), f"{protocol[name]:.3f}", shown)
    return table

"""A line of the table: two ways, their ratio, and how far ours is from what the arithmetic needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from subprocess import CalledProcessError
from typing import TYPE_CHECKING, Any

from benchmarks.floor import Work
from benchmarks.machine import Machine
from benchmarks.timing import Timings

if TYPE_CHECKING:
    from rich.table import Table

BEGIN, END = "<!-- table of python -m benchmarks -->", "<!-- end of table -->"
"""Where a page has its table."""
PROBE = "machine"
"""The way that is no way: the machine's probe, timed in every round."""


@dataclass(frozen=True)
class Row:
    """
    Args:
        key: the letter of its benchmark.
        ratio, low, high: median, smallest and largest over the rounds; None where nothing was compared.
        fastest: the ratio of the fastest round of each way.
        goal: what the ratio may be at most.
        floor: seconds that the least work takes at the speed that this machine had in the same rounds.
        share: floor over what we took; both are medians over the rounds.
    """

    key: str
    what: str
    ours: str = "-"
    other: str = "-"
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    goal: float | None = None
    work: str = ""
    floor: float | None = None
    share: float | None = None
    note: str = ""
    fastest: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def timed_row(
    key: str,
    what: str,
    timings: Timings,
    ours: str,
    other: str,
    *,
    goal: float | None = None,
    work: Work | None = None,
    machine: Machine | None = None,
    note: str = "",
) -> Row:
    """The row of two ways that were timed in the same rounds; with `work`, beside the machine's probe."""
    ratios = timings.ratios(ours, other)
    floors = [machine.floor(work, probe) for probe in timings.seconds[PROBE]] if work and machine else []
    shares = [floor / ours for floor, ours in zip(floors, timings.seconds[ours], strict=False)]
    return Row(
        key,
        what,
        seconds_text(timings.median(ours)),
        seconds_text(timings.median(other)),
        median(ratios),
        min(ratios),
        max(ratios),
        goal,
        str(work) if work else "",
        median(floors) if floors else None,
        median(shares) if shares else None,
        "; ".join(filter(None, [note, "its rounds scattered and were repeated" if timings.repeated else ""])),
        timings.fastest(ours, other),
    )


def failed_row(key: str, what: str, error: Exception) -> Row:
    """In place of the rows of a benchmark that failed: the last line of what it, or its process, said."""
    said = error.stderr if isinstance(error, CalledProcessError) and error.stderr else f"{error}"
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    lines = text.strip().splitlines() or [""]
    return Row(key, what, note=f"failed: {type(error).__name__}: {lines[-1]}")


def limit_row(key: str, what: str, value: float, limit: float, text: Callable[[float], str]) -> Row:
    """The row of one measured value against a limit."""
    return Row(key, what, text(value), text(limit), value / limit, goal=1.0)


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def bytes_text(count: float) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e10 else f"{count / 1e9:.1f} GB"


def table_of(rows: Sequence[Row], caption: str) -> Table:
    from rich.markup import escape  # `benchmarks.gpu` does without
    from rich.table import Table

    table = Table(caption=caption, caption_justify="left")
    for column in ("", "what", "here", "the other way", "ratio", "goal", "least work", "floor", "reached"):
        table.add_column(column, justify="left" if column in ("", "what", "least work") else "right")
    for row in rows:
        table.add_row(*map(escape, cells(row)))
    return table


def cells(row: Row) -> list[str]:
    spread = f"{row.low:.2f} to {row.high:.2f}" if row.low is not None and row.high is not None else ""
    best = "" if row.fastest is None else f"fastest {row.fastest:.2f}"
    beside = "; ".join(filter(None, [spread, best]))
    goal = "" if row.goal is None else f"{row.goal:.2f}"
    if row.goal is not None and row.ratio is not None:
        goal += " met" if row.ratio <= row.goal else " MISSED"
    return [
        row.key,
        row.what + (f" [{row.note}]" if row.note else ""),
        row.ours,
        row.other,
        "-" if row.ratio is None else f"{row.ratio:.2f}" + (f" ({beside})" if beside else ""),
        goal,
        row.work,
        "" if row.floor is None else seconds_text(row.floor),
        "" if row.share is None else f"{100 * row.share:.0f} %",
    ]


def markdown_of(rows: Sequence[Row]) -> str:
    """The same table for a document."""
    head = ["", "what", "here", "the other way", "ratio", "goal", "least work", "floor", "reached"]
    lines = [head, ["---"] * len(head), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def put_into(page: Path, text: str | None) -> None:
    """Replace what the page has between its two marks; with None, only see whether it has them (ValueError)."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no place between {BEGIN!r} and {END!r}")
    if text is not None:
        page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")

"""Rows of the result table: two variants, their ratio, and how close ours comes to the least time possible."""

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
"""The marks around the table on a page."""
PROBE = "machine"
"""Name under which the machine's probe is timed in every round, next to the variants."""

COLUMNS = ("", "what", "here", "the other way", "ratio", "goal", "least work", "floor", "reached")


@dataclass(frozen=True)
class Row:
    """
    Args:
        key: the letter of the benchmark.
        ratio, low, high: median, smallest and largest ratio over the rounds; None if nothing was compared.
        goal: upper limit of the ratio.
        floor: seconds that the least work takes at the speed of this machine in the same rounds (median).
        share: floor divided by our time (median over the rounds).
        fastest: the ratio of the variants' fastest rounds.
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
    """The row of two variants that were timed in the same rounds; `work` and `machine` together give the floor."""
    ratios = timings.ratios(ours, other)
    floors = [machine.floor(work, probe) for probe in timings.seconds[PROBE]] if work and machine else []
    shares = [floor / seconds for floor, seconds in zip(floors, timings.seconds[ours], strict=False)]
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
    """The row of a benchmark that failed: the last line of its error, or of its subprocess's."""
    message = error.stderr if isinstance(error, CalledProcessError) and error.stderr else f"{error}"
    text = message.decode(errors="replace") if isinstance(message, bytes) else message
    lines = text.strip().splitlines() or [""]
    return Row(key, what, note=f"failed: {type(error).__name__}: {lines[-1]}")


def limit_row(key: str, what: str, value: float, limit: float, text: Callable[[float], str]) -> Row:
    """The row of one measured value against a limit."""
    return Row(key, what, text(value), text(limit), value / limit, goal=1.0)


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def bytes_text(count: float) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e10 else f"{count / 1e9:.1f} GB"


def rich_table(rows: Sequence[Row], caption: str) -> Table:
    from rich.markup import escape  # imported here: `benchmarks.gpu` must run without rich
    from rich.table import Table

    table = Table(caption=caption, caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("", "what", "least work") else "right")
    for row in rows:
        table.add_row(*map(escape, cells(row)))
    return table


def cells(row: Row) -> list[str]:
    spread = f"{row.low:.2f} to {row.high:.2f}" if row.low is not None and row.high is not None else ""
    fastest = "" if row.fastest is None else f"fastest {row.fastest:.2f}"
    details = "; ".join(filter(None, [spread, fastest]))
    goal = "" if row.goal is None else f"{row.goal:.2f}"
    if row.goal is not None and row.ratio is not None:
        goal += " met" if row.ratio <= row.goal else " MISSED"
    return [
        row.key,
        row.what + (f" [{row.note}]" if row.note else ""),
        row.ours,
        row.other,
        "-" if row.ratio is None else f"{row.ratio:.2f}" + (f" ({details})" if details else ""),
        goal,
        row.work,
        "" if row.floor is None else seconds_text(row.floor),
        "" if row.share is None else f"{100 * row.share:.0f} %",
    ]


def markdown_table(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def replace_table(page: Path, text: str | None) -> None:
    """Replace the text between a page's two marks; with None, only check that they are there (else ValueError)."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}")
    if text is not None:
        page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")

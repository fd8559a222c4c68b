"""What `video_file=` prints."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from localization_heads.apps.tables import ROWS
from localization_heads.errors import printable
from localization_heads.stages.video import Followed
from localization_heads.store.results import Prediction


def video_table(followed: Followed) -> Table:
    """The first frame of each second, of at most `ROWS` seconds, with box, score and confidence."""
    names = ("time", "frame", "box (x0 y0 x1 y1)", "score", "confidence")
    title = f"{len(followed.predictions)} frames: {followed.query}"
    table = Table(title=escape(printable(title, 80)), caption="one a second; predictions.jsonl has all")
    for name in names:
        table.add_column(name, justify="right")
    seconds: dict[int, Prediction] = {}
    for one in followed.predictions:
        seconds.setdefault(int(one.time or 0), one)
    for one in list(seconds.values())[:ROWS]:
        numbers = ("-" if value is None else f"{value:.2f}" for value in (one.score, one.confidence))
        table.add_row(f"{one.time or 0:.1f} s", str(one.frame), _place(one), *numbers)
    return table


def _place(one: Prediction) -> str:
    if one.bbox is None:
        return "nothing there" if one.absent else "failed"
    return " ".join(f"{edge:.0f}" for edge in one.bbox)

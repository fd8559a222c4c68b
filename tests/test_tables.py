"""What is printed for people: nothing of a stranger's text is obeyed by the terminal, and nothing is endless."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from localization_heads.apps import tables
from localization_heads.apps.printable import printable
from localization_heads.data.jsonl import BadEntry
from localization_heads.data.samples import Sample
from localization_heads.stages.outcome import Outcome
from localization_heads.store.predictions import Prediction

HOSTILE = "the \u001b[2J\u202edog\r\u0007\udce9\u2028[bold]cat"


def printed(table: object, width: int = 120) -> str:
    screen = StringIO()
    Console(file=screen, width=width).print(table)
    return screen.getvalue()


def outcome(expression: str, id: str = "a") -> Outcome:
    prediction = Prediction(id=id, bbox=(0.0, 0.0, 20.0, 30.0), score=0.5)
    return Outcome(Sample("cat.png", expression, id=id), prediction, (1.0, 1.0))


@given(st.text(), st.one_of(st.none(), st.integers(1, 100)))
def test_what_is_printable_is_kept_and_the_rest_is_not(text: str, limit: int | None) -> None:
    shown = printable(text, limit)
    assert all(char.isprintable() or char in "\n\t" for char in shown)
    assert limit is None or (len(shown) <= limit and "\n" not in shown)
    if text.isprintable() and limit is None:
        assert shown == text


def test_spaces_of_other_scripts_stay_spaces() -> None:
    assert printable("un\u00a0chien\u3000là\n\tbas") == "un chien là\n\tbas"
    assert printable("the\n\n dog ", 80) == "the dog"


@pytest.mark.parametrize(
    "show",
    [
        lambda text: tables.predictions_table([outcome(text, text)]),
        lambda text: tables.failures_table([BadEntry(1, text, text)]),
    ],
)
def test_tables_obey_nothing_and_end(show: Callable[[str], object]) -> None:
    text = printed(show(HOSTILE))
    assert not set("\u001b\u202e\r\u0007\udce9\u2028") & set(text)
    assert "[bold]cat" in text
    assert printed(show("word " * 3000)).count("\n") < 15


def test_written_paths_obey_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tables.written([HOSTILE])  # type: ignore[list-item]
    assert "\u001b" not in capsys.readouterr().out


def test_metrics_with_intervals_and_without_values() -> None:
    metrics = {
        "acc@0.5": 0.6666, "acc@0.5_interval": [0.614, 0.719], "mean_iou": None, "num_samples": 3,
    }  # fmt: skip
    text = printed(tables.metrics_table(metrics))
    rows = [[cell.strip() for cell in row.split("│")[1:3]] for row in text.splitlines() if row[:1] == "│"]
    assert rows == [["acc@0.5", "0.667 [0.61, 0.72]"], ["mean_iou", "-"], ["num_samples", "3"]]
    assert "[-, -]" in printed(tables.metrics_table({"acc@0.5": None, "acc@0.5_interval": [None, None]}))


@pytest.mark.parametrize(
    ("box", "text"),
    [
        ((0, 0, 10, 10), "0 0 10 10"),
        ((0, 0, 9.9, 50), "0.0 0.0 9.9 50.0"),
        ((0.2, 0.3, 0.6, 0.7), "0.2 0.3 0.6 0.7"),
    ],
)
def test_small_boxes_show_tenths(box: tuple[float, float, float, float], text: str) -> None:
    assert tables.box_text(box) == text

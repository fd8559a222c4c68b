"""What is printed for people: nothing of a stranger's text is obeyed by the terminal, and nothing is endless."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from localization_heads.apps import tables
from localization_heads.apps.scores import HEADINGS, finding_table, metrics_table
from localization_heads.data.samples import Sample
from localization_heads.errors import BadEntry, printable
from localization_heads.evaluation.scores import Score, summarize
from localization_heads.experiments.paper import Table as FindingTable
from localization_heads.stages.outcome import Outcome
from localization_heads.store.results import Prediction

HOSTILE = "the \u001b[2J\u202edog\r\u0007\udce9\u2028[bold]cat"


def printed(table: object, width: int = 120) -> str:
    screen = StringIO()
    Console(file=screen, width=width).print(table)
    return screen.getvalue()


def outcome(expression: str, id: str = "a") -> Outcome:
    prediction = Prediction(id=id, bbox=(0.0, 0.0, 20.0, 30.0), score=0.5)
    return Outcome(Sample("cat.png", expression, id=id), prediction)


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
        lambda text: tables.predictions_table([outcome(text, text)], "sharp"),
        lambda text: tables.failures_table([BadEntry(1, text, text)]),
    ],
)
def test_tables_obey_nothing_and_end(show: Callable[[str], object]) -> None:
    text = printed(show(HOSTILE))
    assert not set("\u001b\u202e\r\u0007\udce9\u2028") & set(text)
    assert "[bold]cat" in text
    assert printed(show("word " * 3000)).count("\n") < 15


def test_written_paths_obey_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show_paths([HOSTILE])  # type: ignore[list-item]
    assert "\u001b" not in capsys.readouterr().out


def test_scores_with_intervals_and_controls() -> None:
    heads, other = [[Score(1.0, True, 0.5, (4, 4))]] * 3, [[Score(0.4, False, 0.25, (1, 4))]] * 3
    summary = summarize({"heads": heads, "random_heads": other, "native": other})
    metrics = {**summary.pop("heads"), "controls": summary, "num_samples": 3, "num_masks": 3, "num_failed": 2}
    text = printed(metrics_table(metrics), width=80)
    assert "Scores of 3 expressions, 3 with a mask, 2 failed" in text
    heads_row = next(line for line in text.splitlines() if line.startswith("heads"))
    assert heads_row.split()[1:] == [*["1.000"] * 7, "0.500", "1.000", "1.000"]
    lines = text.splitlines()
    assert lines[lines.index(heads_row) + 1].split() == [*["1.0-"] * 7, ".50-", "1.0-", "1.0-"]
    assert lines[lines.index(heads_row) + 2].split() == [*["1.0"] * 7, ".50", "1.0", "1.0"]
    assert "Acc@0.5 +1.000 (+1.00 to +1.00), " in text and "mean IoU +0.600" in text
    assert max(map(len, text.splitlines())) <= 80


def test_no_score_is_cut_off_where_there_are_many_metrics() -> None:
    """Scores of several objects have twelve metrics: two halves of six."""
    one: dict[str, object] = dict.fromkeys(HEADINGS, 0.125)
    intervals = {f"{name}_interval": [0.111, 0.139] for name in HEADINGS}
    metrics = {**one, **intervals, "single_box": {**one, **intervals}, "num_samples": 3, "num_failed": 0}
    text = printed(metrics_table(metrics), width=80)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert text.count("0.125") == 24 and text.count(".11-.14") == 24
    assert text.count("Scores of") == 1 and text.count("best box alone") == 2


def test_scores_without_masks_and_controls() -> None:
    metrics = {**summarize({"heads": [[Score(0.5, True, 0.5)]]})["heads"], "num_samples": 1, "num_failed": 0}
    text = printed(metrics_table(metrics))
    assert "IoU" in text and "cIoU" not in text and "ahead" not in text
    nothing = {**metrics, "energy": None, "energy_interval": [None, None]}
    assert "-" in printed(metrics_table(nothing))


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


def test_a_narrow_screen_keeps_names_and_numbers_whole() -> None:
    """The headings of Fig. 6b are long, its names short: the headings break."""
    columns = (
        "head", "selection frequency (%)", "mean IoU (%)", "pointing (%)", "its IoU's rank among all heads",
    )  # fmt: skip
    found = FindingTable(columns, (("L14H24", "100.0", "56.3", "83.3", "2"), ("L2H0", "9.1", "5.0", "1.2", "17")))
    text = printed(finding_table(found), 80)
    assert "L14H24" in text and "L2H0" in text and "100.0" in text
    assert "rank" in text and "heads" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= 80

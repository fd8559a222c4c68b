"""The log of finished results: what is sound is kept, whatever happened to the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from localization_heads.store.result_log import ResultLog

RESULTS = [(bytes([n]) * 16, {"number": n}) for n in range(3)]


@pytest.fixture
def log(tmp_path: Path) -> ResultLog:
    log = ResultLog(tmp_path, "ground", {"model": "m"})
    log.append(RESULTS)
    return log


def reopened(log: ResultLog) -> ResultLog:
    return ResultLog(log.path.parent, "ground", {"model": "m"})


def test_results_come_back(log: ResultLog) -> None:
    assert [reopened(log).get(key) for key, _ in RESULTS] == [result for _, result in RESULTS]
    assert reopened(log).get(b"x" * 16) is None


def test_other_settings_have_a_log_of_their_own(log: ResultLog) -> None:
    assert ResultLog(log.path.parent, "ground", {"model": "n"}).get(RESULTS[0][0]) is None


@pytest.mark.parametrize("damage", [b"\0\0\0\0", b"[1]\n", b'{"key": 3}\n', b"\xff\xfe"])
def test_a_damaged_line_costs_itself_only(log: ResultLog, damage: bytes) -> None:
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0] + damage + lines[1][len(damage) :] + lines[2])
    again = reopened(log)
    assert [again.get(key) for key, _ in RESULTS] == [{"number": 0}, None, {"number": 2}]
    again.append(RESULTS[1:2])
    assert reopened(log).get(RESULTS[1][0]) == {"number": 1}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_cut_off_by_a_kill_is_dropped(log: ResultLog, cut: int) -> None:
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    again = reopened(log)
    assert again.get(RESULTS[1][0]) == {"number": 1}
    assert again.get(RESULTS[2][0]) is None
    again.append(RESULTS[2:])
    assert [reopened(log).get(key) for key, _ in RESULTS] == [result for _, result in RESULTS]


def test_a_finished_run_leaves_no_log(log: ResultLog) -> None:
    log.finish()
    assert list(log.path.parent.iterdir()) == []

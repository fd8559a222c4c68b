"""The log of finished results: intact lines are kept, whatever happened to the others."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from localization_heads.errors import WorkError
from localization_heads.store.journal import ResultLog

RESULTS = [(bytes([n]) * 16, {"number": n}) for n in range(3)]


@pytest.fixture
def log(tmp_path: Path) -> ResultLog:
    log = ResultLog(tmp_path, "ground", {"model": "m"})
    log.append(RESULTS)
    return log


def reopen(log: ResultLog) -> ResultLog:
    return ResultLog(log.path.parent, "ground", {"model": "m"})


def test_a_reopened_log_has_its_results(log: ResultLog) -> None:
    assert [reopen(log).get(key) for key, _ in RESULTS] == [result for _, result in RESULTS]
    assert reopen(log).get(b"x" * 16) is None


def test_other_settings_have_another_log(log: ResultLog) -> None:
    assert ResultLog(log.path.parent, "ground", {"model": "n"}).get(RESULTS[0][0]) is None


@pytest.mark.parametrize("damage", [b"\0\0\0\0", b"[1]\n", b'{"key": 3}\n', b"\xff\xfe", b"[" * 45])
def test_a_damaged_line_loses_only_its_own_result(log: ResultLog, damage: bytes) -> None:
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0] + damage + lines[1][len(damage) :] + lines[2])
    again = reopen(log)
    assert [again.get(key) for key, _ in RESULTS] == [{"number": 0}, None, {"number": 2}]
    again.append(RESULTS[1:2])
    assert reopen(log).get(RESULTS[1][0]) == {"number": 1}


def test_no_flipped_bit_changes_a_result(log: ResultLog) -> None:
    """Whichever bit of the log is flipped, a result comes back as it was, or not at all."""
    content = log.path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        log.path.write_bytes(flipped)
        again = reopen(log)
        found = [again.get(key) for key, _ in RESULTS]
        assert all(one in (result, None) for one, (_, result) in zip(found, RESULTS, strict=True)), bit
        assert found.count(None) <= 2, bit  # a damaged line break loses the lines on both sides


@pytest.mark.parametrize("json", ["[" * 100_000, "1e999", '{"a": 1e999}', '{"a": NaN}', "[1]", "1" * 5000, "{"])
def test_a_line_with_invalid_json_is_ignored(log: ResultLog, json: str) -> None:
    """Even if its checksum is right."""
    content = f"{RESULTS[1][0].hex()} {json}".encode()
    with log.path.open("ab") as file:
        file.write(f"{zlib.crc32(content, log._seed):08x} ".encode() + content + b"\n")
    again = reopen(log)
    assert [again.get(key) for key, _ in RESULTS] == [{"number": 0}, None, {"number": 2}]


def test_a_failed_write_leaves_the_log_intact(log: ResultLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(WorkError, match=r"cannot write .*: No space left on device"):
            log.append([(b"x" * 16, {"number": 3})])
    assert log.get(b"x" * 16) is reopen(log).get(b"x" * 16) is None
    assert log.get(RESULTS[2][0]) == {"number": 2}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_truncated_line_is_dropped(log: ResultLog, cut: int) -> None:
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    again = reopen(log)
    assert again.get(RESULTS[1][0]) == {"number": 1}
    assert again.get(RESULTS[2][0]) is None
    again.append(RESULTS[2:])
    assert [reopen(log).get(key) for key, _ in RESULTS] == [result for _, result in RESULTS]


def test_finish_removes_the_log(log: ResultLog) -> None:
    log.finish()
    assert list(log.path.parent.iterdir()) == []

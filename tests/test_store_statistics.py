"""The statistics store: records round-trip and survive killed writers, failing disks and damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from localization_heads.errors import UsageError, WorkError
from localization_heads.heads.ranking import rank_heads
from localization_heads.store.statistics import StatisticsStore, sample_key

L, H = 3, 5


def open_store(folder, **settings):
    return StatisticsStore(folder, settings=settings or {"model": "tiny"}, num_layers=L, num_heads=H)


def keys_of(*numbers):
    return [sample_key(f"expression {n}", "http://example.org/a.png") for n in numbers]


def values_of(*numbers):
    """Sums, entropies and flags that are different for each sample."""
    rng = [np.random.default_rng(n) for n in numbers]
    sums = np.stack([r.random((L, H), dtype=np.float32) for r in rng])
    entropies = np.stack([r.random((L, H), dtype=np.float32) for r in rng])
    entropies[:, 0, 0] = np.inf
    return sums, entropies, entropies / 2, sums > 0.5


def check(store, *numbers):
    rows = store.rows(keys_of(*numbers))
    for view, expected in zip(
        (rows.attention_sum, rows.area_entropy, rows.mass_entropy, rows.bottom_row_focus),
        values_of(*numbers),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(view), expected)
        assert view.dtype == expected.dtype


def test_rows_are_in_the_requested_order(tmp_path):
    store = open_store(tmp_path)
    store.append(keys_of(0, 1, 2), *values_of(0, 1, 2))
    store.append(keys_of(3), *values_of(3))
    assert store.keys() == keys_of(0, 1, 2, 3)
    check(store, 3, 0, 2, 0)
    check(open_store(tmp_path), 1, 3)


def test_view_is_indexed_like_an_array(tmp_path):
    store = open_store(tmp_path)
    store.append(keys_of(*range(6)), *values_of(*range(6)))
    view = store.rows(keys_of(4, 2, 0, 5)).attention_sum
    expected = values_of(4, 2, 0, 5)[0]
    assert (len(view), view.shape, view.ndim) == (4, (4, L, H), 3)
    indices = (0, -1, slice(1, 3), np.array([2, 2, 0]), (slice(None), 1), (0, 1, 2), (np.array([0, 3]), 2, 1))
    for index in indices:
        np.testing.assert_array_equal(view[index], expected[index])
    np.testing.assert_array_equal(np.stack(list(view)), expected)


def test_empty_store_has_empty_rows(tmp_path):
    rows = open_store(tmp_path).rows([])
    assert len(rows) == 0
    assert rows.attention_sum[:].shape == (0, L, H)


def test_ranking_from_disk_equals_ranking_from_memory(tmp_path):
    store = open_store(tmp_path)
    numbers = list(range(30))
    store.append(keys_of(*numbers), *values_of(*numbers))
    rows = store.rows(keys_of(*reversed(numbers)))
    sums, _, entropies, bottom = values_of(*reversed(numbers))
    options = {"num_samples": 20, "seed": 3}
    stored = (rows.attention_sum, rows.spatial_entropy("mass"))
    from_disk = rank_heads(*stored, bottom_row=rows.bottom_row_focus, **options)
    assert from_disk == rank_heads(sums, entropies, bottom_row=bottom, **options)


def test_first_record_of_a_key_is_kept(tmp_path):
    store = open_store(tmp_path)
    store.append(keys_of(0, 1, 0), *values_of(0, 1, 2))
    store.append(keys_of(1, 5), *values_of(7, 5))
    check(store, 0, 1, 5)
    assert len(open_store(tmp_path)) == 3


def test_settings_and_shapes_have_separate_files(tmp_path):
    open_store(tmp_path, model="a").append(keys_of(0), *values_of(0))
    assert len(open_store(tmp_path, model="b")) == 0
    assert len(StatisticsStore(tmp_path, settings={"model": "a"}, num_layers=H, num_heads=L)) == 0
    assert len(open_store(tmp_path, model="a")) == 1


def test_records_of_other_settings_fail_the_checksum(tmp_path):
    one, two = open_store(tmp_path, model="a"), open_store(tmp_path, model="b")
    one.append(keys_of(0), *values_of(0))
    two.path.write_bytes(one.path.read_bytes())
    assert len(open_store(tmp_path, model="b")) == 0


def test_partial_last_record_is_dropped(tmp_path):
    store = open_store(tmp_path)
    store.append(keys_of(0, 1), *values_of(0, 1))
    content = store.path.read_bytes()
    for end in range(0, len(content), 7):
        store.path.write_bytes(content[:end])
        opened = open_store(tmp_path)
        assert len(opened) == (end >= len(content) // 2)
        opened.append(keys_of(0, 1), *values_of(0, 1))
        assert store.path.read_bytes() == content


def test_damaged_record_is_skipped_and_rewritten(tmp_path):
    store = open_store(tmp_path)
    store.append(keys_of(0, 1, 2), *values_of(0, 1, 2))
    content = bytearray(store.path.read_bytes())
    size = len(content) // 3
    for offset in (0, 17, size - 5, size - 1):
        damaged = bytearray(content)
        damaged[size + offset] ^= 0x10
        store.path.write_bytes(damaged)
        opened = open_store(tmp_path)
        assert opened.keys() == keys_of(0, 2)
        check(opened, 0, 2)
        opened.append(keys_of(1), *values_of(1))
        check(open_store(tmp_path), 0, 1, 2)
    store.path.write_bytes(content[:size] + bytes(size))  # as after a power failure
    assert open_store(tmp_path).keys() == keys_of(0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sums, *others: (sums[:, :2], *others),
        lambda sums, *others: (sums[:1], *others),
        lambda sums, *others: (np.full_like(sums, np.nan), *others),
    ],
)
def test_invalid_arrays_are_rejected_before_writing(spoil, tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match="attention_sum"):
        store.append(keys_of(0, 1), *spoil(*values_of(0, 1)))
    assert not store.path.exists()


def test_failing_disk_leaves_complete_records(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.append(keys_of(0), *values_of(0))
    for error, raised in (
        (OSError(28, "No space left"), WorkError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        monkeypatch.setattr(os, "fsync", Mock(side_effect=error))
        with pytest.raises(raised):
            store.append(keys_of(1), *values_of(1))
        monkeypatch.undo()
        check(store, 0)
        assert len(open_store(tmp_path)) == 1
    store.append(keys_of(1), *values_of(1))
    check(open_store(tmp_path), 0, 1)


def test_store_in_an_unwritable_place_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"):
        open_store(tmp_path / "file")


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_store_statistics import keys_of, open_store, values_of
store = open_store(sys.argv[1])
for n in range(10_000):
    store.append(keys_of(2 * n, 2 * n + 1), *values_of(2 * n, 2 * n + 1))
    print(2 * n + 2, flush=True)
"""


def test_killed_writer_loses_at_most_the_last_chunk(tmp_path):
    for delay in (0.0, 0.003, 0.007):
        here = str(Path(__file__).parent)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), here], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        done = int(writer.stdout.readline())
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split(b"\n")[:-1]  # the last line may be partial
        writer.stdout.close()
        writer.wait()
        done = int(rest[-1]) if rest else done
        store = open_store(tmp_path)
        assert len(store) >= done
        check(store, *range(done))


def test_sample_key_identifies_a_sample(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"x")
    first = sample_key("a cat", image, "id")
    assert len(first) == 16
    assert sample_key("a cat", str(image), "id") == first
    image.write_bytes(b"xy")
    changed = sample_key("a cat", image, "id")
    missing = sample_key("a cat", tmp_path / "no.png", "id")
    address = sample_key("a cat", "http://x/a.png", "id")
    others = {first, changed, missing, address, sample_key("a dog", image, "id"), sample_key("a cat", image)}
    assert len(others) == 6


def test_sample_key_is_independent_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert sample_key("e", "a.png") == sample_key("e", tmp_path / "a.png")

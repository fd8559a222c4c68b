"""Parquet tables and atomically replaced folders: round trips, and what remains after a failure."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet
import pytest

from localization_heads.errors import UsageError, WorkError
from localization_heads.store import files
from localization_heads.store.files import remove_leftovers, replace_folder
from localization_heads.store.results import write_parquet


def test_parquet_round_trip(tmp_path: Path) -> None:
    columns = {"a": "text", "b": "number", "c": "whole", "d": "texts", "e": "numbers"}
    rows = [
        {"a": "der Hund 犬\u0007", "b": 0.1, "c": 2**40, "d": ["x", ""], "e": [1.5, 2.0]},
        {"a": None, "e": []},
    ]
    path = tmp_path / "deep" / "rows.parquet"
    write_parquet(path, columns, rows)
    table = pyarrow.parquet.read_table(path)
    assert table.column_names == list(columns)
    assert table.to_pylist() == [rows[0], {"a": None, "b": None, "c": None, "d": None, "e": []}]
    first = path.read_bytes()
    write_parquet(path, columns, rows)
    assert path.read_bytes() == first
    write_parquet(path, columns, [])
    assert pyarrow.parquet.read_table(path).num_rows == 0


def test_failed_parquet_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, {"a": "whole"}, [{"a": 1}])
    with pytest.raises(Exception, match="int"):
        write_parquet(path, {"a": "whole"}, [{"a": "one"}])
    assert pyarrow.parquet.read_table(path).to_pylist() == [{"a": 1}]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]


def test_folder_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "new" / "failures"
    with replace_folder(path) as folder:
        (folder / "a.png").write_text("a")
        assert not path.exists()
    assert [p.name for p in path.iterdir()] == ["a.png"]
    with replace_folder(path) as folder:
        (folder / "b.png").write_text("b")
        assert [p.name for p in path.iterdir()] == ["a.png"]
    assert [p.name for p in path.iterdir()] == ["b.png"]
    assert [p.name for p in path.parent.iterdir()] == ["failures"]


def test_failed_replacement_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "failures"
    with replace_folder(path) as folder:
        (folder / "a.png").write_text("a")

    def fill_and_fail(error: BaseException) -> None:
        with replace_folder(path) as folder:
            (folder / "b.png").write_text("b")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fill_and_fail(KeyboardInterrupt())
    with pytest.raises(WorkError, match="No space left"):
        fill_and_fail(OSError(28, "No space left on device"))
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if target == path and self.name.endswith(".tmp") and (self / "b.png").exists():
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(WorkError), replace_folder(path) as folder:
        (folder / "b.png").write_text("b")
    assert [p.name for p in path.iterdir()] == ["a.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["failures"]


def test_file_or_link_is_replaced_by_the_folder(tmp_path: Path) -> None:
    path, precious = tmp_path / "failures", tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").write_text("x")
    path.write_text("a file")
    with replace_folder(path):
        pass
    assert path.is_dir()
    path.rmdir()
    path.symlink_to(precious)
    with replace_folder(path):
        pass
    assert path.is_dir() and not path.is_symlink()
    assert (precious / "thesis").read_text() == "x"


def test_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="output_dir"), replace_folder(tmp_path / "file" / "failures"):
        pass


def test_leftover_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replace_folder(tmp_path / "failures") as folder:
        name = folder.name
    dead = tmp_path / name.replace(f"-{os.getpid()}-", "-99999-")
    dead.mkdir()
    (dead / "a.png").write_text("a")
    monkeypatch.setattr(files, "_is_running", lambda pid: pid != 99999)
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["failures"]

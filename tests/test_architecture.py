"""The order of the rooms that docs/architecture.md states, held against every import of the package.

All imports count, also those inside functions and under `TYPE_CHECKING`: a circle that hides there is still a circle.
That `--help` and `import localization_heads` load no torch is tested in test_frontdoor.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import localization_heads

PACKAGE = Path(localization_heads.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
ROW = re.compile(r"^\| `([a-z_/]+)(?:/|\.py)` \|[^|]+\|([^|]+)\|", re.MULTILINE)
"""A room, or a file of a room that stands lower than the rest of it, and the files of the row."""

UPWARDS = {
    ("store.results", "data.masks"): "a prediction's mask is checked by the one reader of COCO run lengths",
}
"""Imports of a higher room, each with its reason. One that is no longer needed fails the test, so the list shrinks."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name, which leaves out the package's own: `heads.criteria`."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        *parents, stem = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parents if stem == "__init__" else [*parents, stem])] = file
    return found


def imported(file: Path) -> Iterator[str]:
    """The package's modules that a file imports, wherever in the file the import stands."""
    prefix = "localization_heads."
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: imports are absolute in this package"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            inner = name.removeprefix(prefix)
            if inner != name:  # the name of a module, or of something in a module
                yield inner if inner in modules() else inner.rpartition(".")[0]


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules it imports. The package's `__init__` only hands public names on, so it is left out."""
    return {name: set(imported(file)) - {name, ""} for name, file in modules().items() if name}


def ranked() -> list[str]:
    """The rooms from the top of the house to its ground floor, as the table of the page lists them."""
    return [row.replace("/", ".") for row, _ in rows()]


@cache
def rows() -> list[tuple[str, str]]:
    return ROW.findall(PAGE.read_text(encoding="utf-8"))


def room(module: str) -> str:
    """The row of a module: its own if it has one, else that of the innermost folder which has one."""
    while module not in ranked() and "." in module:
        module = module.rpartition(".")[0]
    return module


def test_the_parser_sees_imports_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "import localization_heads.errors\n"
        "from localization_heads import cells\n"
        "if TYPE_CHECKING:\n"
        "    from localization_heads.heads.head import Head\n"
        "def lazy():\n"
        "    from localization_heads.lvlm.checkpoints.loading import load_model\n"
    )
    assert set(imported(file)) == {"errors", "cells", "heads.head", "lvlm.checkpoints.loading"}


def test_no_import_circle() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(reversed(error.args[1]))}")


def test_every_room_has_one_row_in_the_table() -> None:
    rooms = {room(name) for name in modules() if name}
    assert sorted(ranked()) == sorted(rooms)


def test_imports_point_downwards() -> None:
    rank = {name: number for number, name in enumerate(ranked())}
    upwards = {
        (module, target)
        for module, targets in imports().items()
        for target in targets
        if rank[room(target)] < rank[room(module)]
    }
    assert upwards == set(UPWARDS), "an import of a higher room, or an exception that is no longer needed"


def test_the_table_names_every_file() -> None:
    """`python docs/build_architecture.py` brings that column up to date."""
    for name, files in rows():
        if (PACKAGE / name).is_dir():
            inside = [path for module, path in modules().items() if room(module) == name.replace("/", ".")]
            expected = {path.relative_to(PACKAGE / name).as_posix() for path in inside}
            shown = set(re.findall(r"`([^`]+\.py)`", files))
            assert shown == {file for file in expected if not file.endswith("__init__.py")}, name


def test_every_public_name_is_there() -> None:
    for name in localization_heads.__all__:
        assert getattr(localization_heads, name) is not None

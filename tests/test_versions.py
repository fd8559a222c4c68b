"""A version of a library that does not fit is one sentence with both versions, before anything is imported."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from front import Front, one_line

import localization_heads as lh
from localization_heads.errors import WorkError
from localization_heads.packages import NEEDED, check_versions

ROOT = Path(__file__).parents[1]
OLD = {
    "torch": ("2.5.1+cu121", "2.6 or newer: pip install 'torch>=2.6'"),
    "transformers": ("4.57.1", "5.23 or newer and older than 6: pip install 'transformers>=5.23,<6'"),
    "accelerate": ("1.2.0", "1.2.1 or newer: pip install 'accelerate>=1.2.1'"),
}


@pytest.fixture(autouse=True)
def _checked_anew() -> Iterator[None]:
    check_versions.cache_clear()
    yield
    check_versions.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda asked: version if asked == name else real(asked))


@pytest.mark.parametrize("name", OLD)
def test_an_old_version_is_named_with_the_one_that_is_needed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, needed = OLD[name]
    pretend(monkeypatch, name, found)
    with pytest.raises(WorkError) as caught:
        lh.load_model  # noqa: B018 -- the name alone imports it
    assert str(caught.value) == f"{name} {found} is installed, and this needs {needed}"


@pytest.mark.parametrize("version", ["5.22.2", "6.0.0", "5.0"])
def test_versions_outside_the_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "transformers", version)
    with pytest.raises(WorkError, match=f"transformers {version} is installed"):
        check_versions()


@pytest.mark.parametrize("version", ["5.23.0", "5.24.1", "5.23.0.dev0", "5.100", "unknown"])
def test_versions_inside_the_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "transformers", version)
    check_versions()


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", none)
    with pytest.raises(WorkError, match="torch is missing: pip install 'torch>=2"):
        check_versions()


def test_a_command_says_it_in_one_line(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "transformers", "4.57.1")
    result = front.finder("stage=ground", "image_file=x.png", "query=dog")
    assert result.status == 1
    assert "transformers 4.57.1 is installed" in one_line(result.err)


def test_nothing_is_imported_before() -> None:
    """An older transformers would fail inside, with an import error of its own."""
    code = (
        "import sys; from importlib import metadata; metadata.version = lambda _: '0.1'\n"
        "import localization_heads as lh\n"
        "try: lh.load_model\n"
        "except Exception as error: print(error)\n"
        "print(sorted({'torch', 'transformers', 'accelerate', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    first, second = done.stdout.splitlines()
    assert "torch 0.1 is installed" in first
    assert second == "[]"


def test_the_ranges_are_those_of_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {f"{name}{needed.requirement}" for name, needed in NEEDED.items()} <= set(declared)

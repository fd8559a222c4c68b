"""Every code block of the documentation runs, and its site builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, browser
from documents import blocks, commands
from front import Front, cached_load_model

from localization_heads.lvlm.checkpoints import loading
from localization_heads.options import programs

STAGES = programs.Stage.__args__

ROOT = Path(__file__).parents[1]
SCENES = 24
"""Instead of the hundreds that a page asks for."""
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.fixture
def front(front: Front) -> Front:
    """The commands in a folder that looks like the repository's root."""
    (front.folder / "examples").symlink_to(ROOT / "examples")
    return front


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_model", cached_load_model)
    names: dict[str, Any] = {"__name__": "a_page"}
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if not block.is_run:
            continue
        if block.language == "python":
            exec(compile(block.text, where, "exec"), names)
        elif block.language == "bash":
            for door, options in commands(block):
                if "cli_mode=true" in options:
                    monkeypatch.setattr(sys, "stdin", (front.folder / "no-lines").open("w+"))
                if "data=scenes" in options:
                    options = [*options, f"scenes.count={SCENES}"]
                result = getattr(front, door)(*options)
                assert result.status == 0, f"{where}: {' '.join(options)}\n{result.err}"


def test_every_stage_has_its_lines_of_python() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [stage for stage in STAGES if f"`stage={stage}`" not in page and f"`{stage}`" not in page] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Not with `--quiet`, which keeps warnings from being counted."""
    pytest.importorskip("mkdocs", reason="the site's generator is not installed")
    pytest.importorskip("mkdocstrings", reason="the site's generator is not installed")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "api.html").is_file()
    if CHROMIUM:
        check_from_disk(tmp_path / "grounding.html")


SEARCH = """
new Promise((done) => {
  const field = document.querySelector("[data-md-component=search-query]");
  const found = document.querySelector("[data-md-component=search-result]");
  field.focus();
  field.value = "calibration";
  for (const kind of ["keyup", "input"]) field.dispatchEvent(new Event(kind, {bubbles: true}));
  const look = () => found.innerText.includes("matching document") ? done(found.innerText) : setTimeout(look, 50);
  look();
})
"""


def check_from_disk(page: Path) -> None:
    """Without a server and a network: the search finds, and a copy button copies commands without their output."""
    with browser() as site:
        site.open(page)
        assert "How sure a box is" in site.run(SEARCH)
        copied = site.run("[...document.querySelectorAll('[data-clipboard-text]')].map(b => b.dataset.clipboardText)")
        assert copied
        assert all(text.startswith("python ") and "┃" not in text for text in copied)
        assert not [address for address in site.requests if address.startswith("http")]


def test_the_notebook_runs_and_shows_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="no notebook tools")
    client = pytest.importorskip("nbclient", reason="no notebook tools")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    said = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output)
    first, last = (float(iou) for iou in re.findall(r"mean IoU (\d\.\d\d)", said))
    assert first > last, "the heads that the ranking finds localise no better than the last ones"

"""The notebook runs from top to bottom, and shows what it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_quickstart_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="no notebook tools")
    client = pytest.importorskip("nbclient", reason="no notebook tools")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    said = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    first, last = (float(iou) for iou in re.findall(r"mean IoU (\d\.\d\d)", said))
    assert first > last, "the heads that the ranking finds localise no better than the last ones"

"""Writes the outputs that the pages show anew: `python docs/build_pages.py [PAGE ...]`, from the repository's root.

Runs, in a folder of its own, what a reader would run, and replaces what the page says came out:

- a `bash` block whose commands begin with `$`: what each of them prints (one with a comment is shown, not run);
- what stands between `<!-- output of: COMMAND -->` and `<!-- end of output -->`, fenced or not;
- the images in `docs/images` that come out of these commands (`DRAWN`);
- with all pages, or by its name, what the cells of `examples/quickstart.ipynb` show.

No output on a page is written by hand. `docs/build_experiments.py` makes the page of the experiments, `docs/screens.py`
the images of the report and the demo.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
NOTEBOOK = "examples/quickstart.ipynb"
SHOWN = re.compile(r"^```bash\n(?=\$ )(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKED = re.compile(r"(<!-- output of: (.+?) -->\n)(.*?)(^<!-- end of output -->)", re.MULTILINE | re.DOTALL)
FENCE = "```"

TINY = Path("outputs") / "localization_heads" / "tiny"
DRAWN = {
    "visualization.png": TINY / "attention" / "one_visualization.png",
    "components.png": TINY / "attention" / "one_components_L4H4.png",
    "trace.png": TINY / "attention" / "answer_trace.png",
    "several.png": TINY / "attention" / "two_grounding.png",
    "ablation.png": TINY / "ablation.png",
    "attention_sums.png": TINY / "attention_sums.png",
    "selection_frequency.png": TINY / "selection_frequency.png",
}
"""Images that the commands of the pages draw, by their name in docs/images."""


def main() -> None:
    pages = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))
    names = sys.argv[1:] or ["README.md", *pages, NOTEBOOK]
    if NOTEBOOK in names:
        names.remove(NOTEBOOK)
        _run_notebook(ROOT / NOTEBOOK)
    with tempfile.TemporaryDirectory() as folder:
        work = _workplace(Path(folder))
        for name in names:
            _rewrite(ROOT / name, work)
        for image, source in DRAWN.items():
            if (work / source).is_file():
                shutil.copyfile(work / source, IMAGES / image)
                print(f"wrote docs/images/{image}")  # noqa: T201


def _run_notebook(path: Path) -> None:
    """Run its cells from the repository's root, as the tests do, and keep what they show, without warnings."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = str(ROOT)
    client = NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    nbformat.write(notebook, path)
    print(f"wrote {path.relative_to(ROOT)}")  # noqa: T201


def _workplace(folder: Path) -> Path:
    """A folder that looks like the repository's root, but for what was written there before."""
    for path in ROOT.iterdir():
        if path.name not in ("outputs", ".venv"):
            (folder / path.name).symlink_to(path)
    return folder


def _rewrite(page: Path, work: Path) -> None:
    before = page.read_text(encoding="utf-8")
    after = MARKED.sub(lambda match: _marked(match, work), before)
    after = SHOWN.sub(lambda match: f"```bash\n{_session(match[1], work)}```", after)
    if after != before:
        page.write_text(after, encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")  # noqa: T201


def _marked(match: re.Match[str], work: Path) -> str:
    """The output of one command, in a fence if it stood in one before."""
    fence = re.match(rf"{FENCE}\w*\n", match[3])
    shown = _run(match[2], work)
    return f"{match[1]}{fence[0] + shown + FENCE if fence else shown.rstrip()}\n{match[4]}"


def _session(block: str, work: Path) -> str:
    """The commands of a block, each followed by what it prints."""
    text = []
    for command in re.findall(r"^\$ (?:.*\\\n)*.*", block, re.MULTILINE):
        text.append(f"{command}\n")
        if "#" not in command:
            text.append(_run(command[2:], work))
    return "".join(text)


def _run(command: str, work: Path) -> str:
    """What a command prints on a terminal of 80 columns, without the blanks at the ends of lines."""
    words = shlex.split(command.replace("\\\n", " "))
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(work)}
    done = subprocess.run(words, cwd=work, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command!r} ended with status {done.returncode}")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


if __name__ == "__main__":
    main()

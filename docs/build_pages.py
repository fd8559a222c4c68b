"""Regenerate the outputs that the pages show: `python docs/build_pages.py [PAGE ...]`, from the repository's root.

The commands of a page are run in a temporary folder, as a reader would run them, and replace their outputs on the page:

- a `bash` block whose commands begin with `$`: what each of them prints (one with a comment is shown, not run);
- the text between `<!-- output of: COMMAND -->` and `<!-- end of output -->`, fenced or not;
- the images in `docs/images` that these commands draw (`FIGURES`);
- the outputs of the cells of `examples/quickstart.ipynb`, if no page or the notebook is named.

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
SESSION = re.compile(r"^```bash\n(?=\$ )(.*?)^```$", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"(<!-- output of: (.+?) -->\n)(.*?)(^<!-- end of output -->)", re.MULTILINE | re.DOTALL)
FENCE = "```"

TINY = Path("outputs") / "localization_heads" / "tiny"
FIGURES = {
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
        work = _link_repository(Path(folder))
        for name in names:
            _rewrite(ROOT / name, work)
        for image, source in FIGURES.items():
            if (work / source).is_file():
                shutil.copyfile(work / source, IMAGES / image)
                print(f"wrote docs/images/{image}")  # noqa: T201


def _run_notebook(path: Path) -> None:
    """Run the cells from the repository's root, as the tests do, and store their outputs without warnings."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = str(ROOT)
    client = NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)
    print(f"wrote {path.relative_to(ROOT)}")  # noqa: T201


def _link_repository(folder: Path) -> Path:
    """Fill `folder` with links to the files of the repository, except earlier outputs."""
    for path in ROOT.iterdir():
        if path.name not in ("outputs", ".venv"):
            (folder / path.name).symlink_to(path)
    return folder


def _rewrite(page: Path, work: Path) -> None:
    before = page.read_text(encoding="utf-8")
    after = OUTPUT.sub(lambda match: _replace_output(match, work), before)
    after = SESSION.sub(lambda match: f"```bash\n{_run_session(match[1], work)}```", after)
    if after != before:
        page.write_text(after, encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")  # noqa: T201


def _replace_output(match: re.Match[str], work: Path) -> str:
    """The markers with the command's new output, fenced if the old output was."""
    fence = re.match(rf"{FENCE}\w*\n", match[3])
    shown = _run(match[2], work)
    return f"{match[1]}{fence[0] + shown + FENCE if fence else shown.rstrip()}\n{match[4]}"


def _run_session(block: str, work: Path) -> str:
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

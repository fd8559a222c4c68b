"""Draw the figure of `docs/architecture.md` and fill its column of files: `python docs/build_architecture.py`.

Run it from the repository's root. It does not change the order of the table's rows.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "localization_heads"
PAGE = ROOT / "docs" / "architecture.md"
FIGURE = ROOT / "docs" / "images" / "architecture.png"
ROW = re.compile(r"^(\| `([a-z_/]+)/` \|[^|]+\|)[^|]*\|$", re.MULTILINE)

# Okabe and Ito's colour-blind safe palette, lightened so that black text is readable.
SHELL, SAMPLES, MODEL, SCIENCE, RESULT, GROUND = (
    "#f5e6a8",
    "#bfe3f7",
    "#a6dccb",
    "#f4c7a1",
    "#e6c3d8",
    "#e3e3e3",
)

BOXES = {
    "apps": (0.2, 8.2, 3.7, "apps/", "commands, conversation, demo", SHELL),
    "stages": (4.4, 8.2, 5.4, "stages/", "find, ground, evaluate, ...: thin, resumable", SHELL),
    "options": (10.3, 8.2, 2.9, "options/", "every option once", SHELL),
    "api": (13.7, 8.2, 3.1, "Python  interop/", "find, ground, evaluate;\nother tools", SHELL),
    "sources": (0.2, 5.3, 2.7, "datasets/  scenes/", "benchmarks as JSON lines", SAMPLES),
    "data": (0.2, 3.5, 2.7, "data/", "Sample: image,\nexpression, ground truth", SAMPLES),
    "lvlm": (3.6, 3.5, 2.7, "lvlm/", "encode the image once,\nattend per expression", MODEL),
    "maps": (7.0, 3.5, 2.4, "attention.py", "AttentionMaps:\n[layer, head, h, w]", MODEL),
    "heads": (10.2, 5.3, 2.8, "heads/", "criteria, ranking\n\N{RIGHTWARDS ARROW} heads.json", SCIENCE),
    "grounding": (
        10.2,
        3.5,
        2.8,
        "grounding/",
        "read-out \N{RIGHTWARDS ARROW} box,\nscore, pseudo-mask",
        SCIENCE,
    ),
    "segmentation": (10.2, 1.7, 2.8, "segmentation/", "box and map \N{RIGHTWARDS ARROW} mask", SCIENCE),
    "experiments": (13.9, 5.3, 2.9, "experiments/", "the paper's tables\nand figures", RESULT),
    "evaluation": (13.9, 3.5, 2.9, "evaluation/", "metrics, controls,\nintervals", RESULT),
    "figures": (13.9, 1.7, 2.9, "figures/  report/", "drawings, one page per run", RESULT),
    "store": (
        0.2,
        0.1,
        16.6,
        "store/   cells.py   errors.py",
        "used everywhere: files on disk, from cells to pixels, errors",
        GROUND,
    ),
}
"""Room -> left, bottom, width, name, caption, colour."""

HEIGHT = 1.2

ARROWS = (
    ("apps", "stages"),
    ("options", "stages"),
    ("sources", "data"),
    ("data", "lvlm"),
    ("lvlm", "maps"),
    ("maps", "heads"),
    ("maps", "grounding"),
    ("heads", "grounding"),
    ("grounding", "segmentation"),
    ("grounding", "evaluation"),
    ("evaluation", "experiments"),
    ("evaluation", "figures"),
)


def main() -> None:
    PAGE.write_text(ROW.sub(_with_files, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    _draw()


def _with_files(row: re.Match[str]) -> str:
    """The row of a folder with its files, except files that have their own row or whose folder has one."""
    folder = PACKAGE / row[2]
    paths = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.py")) if file.stem != "__init__"]
    files = [f"`{path}`" for path in paths if not _has_a_row(row[2], path, row.string)]
    return f"{row[1]} {', '.join(files)} |" if files else row[0]


def _has_a_row(room: str, path: str, page: str) -> bool:
    folder, is_inner, _ = path.partition("/")
    return f"| `{room}/{path}` |" in page or (bool(is_inner) and f"| `{room}/{folder}/` |" in page)


def _draw() -> None:
    mpl.rcParams["font.family"] = "DejaVu Sans"
    figure, axes = plt.subplots(figsize=(11, 6.1), layout="constrained")
    axes.set(xlim=(0, 17), ylim=(0, 9.5))
    axes.axis("off")
    for left, bottom, width, name, caption, colour in BOXES.values():
        _box(axes, left, bottom, width, name, caption, colour)
    for start, end in ARROWS:
        _arrow(axes, start, end)
    _frame(axes, 0.0, 1.5, 17.0, 6.1, "the path of a sample, carried out by stages/, or from Python", "0.6")
    _frame(axes, 9.95, 1.6, 3.3, 5.4, "grounder.py", "0.25")
    figure.savefig(FIGURE, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _frame(axes: Axes, left: float, bottom: float, width: float, height: float, caption: str, colour: str) -> None:
    style = "round,pad=0,rounding_size=.15"
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=style, fill=False, ls="--", ec=colour))
    axes.text(left + width / 2, bottom + height - 0.14, caption, ha="center", va="top", fontsize=9, style="italic")


def _box(axes: Axes, left: float, bottom: float, width: float, name: str, caption: str, colour: str) -> None:
    style = "round,pad=0,rounding_size=.12"
    axes.add_patch(FancyBboxPatch((left, bottom), width, HEIGHT, boxstyle=style, fc=colour, ec="0.3", lw=0.8))
    centre = left + width / 2
    top = bottom + HEIGHT - (0.15 if "\n" in caption else 0.28)  # centres two or three lines
    axes.text(centre, top, name, ha="center", va="top", fontsize=10, weight="bold")
    axes.text(centre, top - 0.38, caption, ha="center", va="top", fontsize=8.5, linespacing=1.15)


def _arrow(axes: Axes, start: str, end: str) -> None:
    """An arrow between the edges of two boxes: horizontal if they lie side by side, otherwise vertical."""
    (x0, y0, w0), (x1, y1, w1) = BOXES[start][:3], BOXES[end][:3]
    half_height, centre = HEIGHT / 2, x0 + w0 / 2
    if x0 + w0 < x1:
        tail, head = (x0 + w0, y0 + half_height), (x1, y1 + half_height)
    elif x1 + w1 < x0:
        tail, head = (x0, y0 + half_height), (x1 + w1, y1 + half_height)
    elif y0 > y1:
        tail, head = (centre, y0), (centre, y1 + HEIGHT)
    else:
        tail, head = (centre, y0 + HEIGHT), (centre, y1)
    axes.add_patch(FancyArrowPatch(tail, head, arrowstyle="-|>", mutation_scale=12, color="0.25", shrinkA=1, shrinkB=1))


if __name__ == "__main__":
    main()

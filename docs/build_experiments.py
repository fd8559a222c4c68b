"""Makes `docs/experiments.md` and its figures anew: `python docs/build_experiments.py`, from the repository's root.

Runs the commands that the page names on the embedded model and the synthetic benchmark (a few minutes on one core;
a second run goes on from `outputs/docs`), and writes what they wrote. No number of the page is written by hand.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "experiments.md"
IMAGES = ROOT / "docs" / "images" / "experiments"
WORK = Path("outputs") / "docs"
PROGRAM = "localization_heads_finder.py"

NOT_RUN = "<!-- not run: it takes minutes; tests/test_experimenting.py runs the same on a dozen scenes -->"

RUNS = {
    "scenes": ("experiment=all", "data=scenes"),
    "openmoji": (
        "experiment=all",
        "experiment.names=[fig6b,random,tab5]",
        "data=scenes",
        "scenes.style=openmoji",
    ),
    "wide": ("experiment=ladder", "data=scenes", "scenes.height=176"),
}
"""What is run, by the name of its folder below outputs/docs."""

QUESTIONS = {
    "fig3": "Which heads attend to the image at all? (Criterion 1)",
    "fig6a": "Which heads are selected again and again, expression after expression? No labels are used.",
    "fig6b": (
        "Do heads that are selected more often localise better? Here the ground truth is used for the first "
        "time: the IoU of each head's own map, binarised at its mean, with the true mask. Rho over all heads "
        "is not in the paper; it shows whether the correlation depends on which heads are included."
    ),
    "random": (
        "Would any three heads of the same layers have done as well, or all heads without any choice? Not in the "
        "paper. The difference is paired, expression by expression, and its interval is a bootstrap over "
        "expressions. Where all heads do nearly as well, that is no argument against choosing: most of the embedded "
        "model's 48 heads hardly attend to the image, so they add little to the sum, which is then that of the few "
        "that do. Large models have many heads that attend to the image and rest elsewhere."
    ),
    "tab1": "How well do the boxes fit?",
    "tab2": (
        "How well do the masks fit? In the sweeps below, masks are the filled hulls, without a segmenter."
    ),
    "tab3": "The metrics of ReasonSeg, here on the scenes; the benchmark itself has to be downloaded.",
    "tab4": "How many heads should be combined?",
    "tab5": (
        "Is each criterion needed, and should heads be fixed? Our readings: criterion 1 alone takes the "
        "highest attention sums, criterion 2 alone ranks by selection frequency without a threshold, and "
        "greedy selects in the same way from the values of a single expression."
    ),
    "tab8": "How much smoothing? Sigma and kernel size are swept one at a time.",
    "fig13": "Does the threshold of criterion 1 matter?",
    "fig14": "Does N, the number of heads selected per expression, matter?",
    "ladder": (
        "What separates the published code's box from the paper's, one change at a time? On images that are "
        "wider than tall, which the processor pads. [The rungs](reproducing-the-paper.md#the-ladder)"
    ),
}

INTRO = """# The paper's experiments on the embedded model

Model: the embedded LLaVA ([card](embedded-model.md)). Data: {samples} held-out scenes of the synthetic benchmark, one
expression each, with exact boxes and masks. Heads are found on these same expressions, without using their boxes and
masks, as the paper does for its figures. One command makes this page, `python docs/build_experiments.py`; nothing below
is written by hand, not even the sentences about numbers.

The tables show the paper's numbers next to ours where there are any. They are for other models and other data: compare
the trends (is k = 3 best, do both criteria help), not the values.

{summary}

The model runs over the data once; `experiment=fig6b` and the others then only read from disk.
[Reproducing the paper](reproducing-the-paper.md) says how to run the same on RefCOCO with the paper's models.

Whether the model needs the heads for its answers is an experiment of its own, `experiment=causal`: [what heads
do](causal.md).
"""


def main() -> None:
    for name, options in RUNS.items():
        run(name, options)
    shutil.rmtree(IMAGES, ignore_errors=True)
    IMAGES.mkdir(parents=True)
    PAGE.write_text(page(ROOT / WORK), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE.relative_to(ROOT)} and {len(list(IMAGES.iterdir()))} figures\n")


def run(name: str, options: tuple[str, ...]) -> None:
    places = [f"output_dir={WORK / name}", f"scenes.folder={WORK / 'scenes_data'}"]
    done = subprocess.run(
        [sys.executable, PROGRAM, "stage=experiment", *options, *places], cwd=ROOT, check=False
    )
    if done.returncode:
        sys.exit(f"{name}: status {done.returncode}")


def page(work: Path) -> str:
    """The page from what the runs left in `work`; copies the figures that it shows."""
    scenes = {path.stem: json.loads(path.read_text()) for path in _folder(work, "scenes").glob("*.json")}
    parts = [_intro(scenes), "## On scenes of the kind it was trained on", _command("scenes")]
    parts += [_section(work, "scenes", name) for name in QUESTIONS if name in scenes]
    parts += [
        "## In an art style that the model was never trained on",
        _command("openmoji"),
        *(_section(work, "openmoji", name) for name in ("fig6b", "random", "tab5")),
        "## From the published code's box to the paper's",
        _command("wide"),
        _section(work, "wide", "ladder"),
    ]
    return "\n".join(f"{part.strip()}\n" for part in parts)


def _intro(found: Mapping[str, Any]) -> str:
    summary = "\n".join(f"- {found[name]['reading']}" for name in ("fig6b", "random"))
    samples = found["fig6b"]["samples"]
    return INTRO.format(samples=samples, summary=summary)


def _command(run: str) -> str:
    return f"{NOT_RUN}\n\n```bash\npython {PROGRAM} stage=experiment {' '.join(RUNS[run])}\n```"


def _section(work: Path, run: str, name: str) -> str:
    """What an experiment wrote, with its question and, if it has one, its figure beside the page."""
    folder = _folder(work, run)
    title, _, rest = (folder / f"{name}.md").read_text(encoding="utf-8").partition("\n\n")
    figure = f"{name}.png" if run == "scenes" else f"{run}_{name}.png"
    if (folder / f"{name}.png").is_file() and f"({name}.png)" in rest:
        shutil.copyfile(folder / f"{name}.png", IMAGES / figure)
    rest = re.sub(rf"\({name}\.png\)", f"(images/experiments/{figure})", rest)
    return f"#{title}\n\n*{QUESTIONS[name]}*\n\n{rest}"


def _folder(work: Path, run: str) -> Path:
    return work / run / "tiny" / "experiments"


if __name__ == "__main__":
    main()

"""How a large folder of weights is loaded: seconds until something is on the screen, and memory at its height.

`python -m benchmarks.loading` writes a LLaVA with random weights in bfloat16 into a folder, grounds with it in a
command of its own, and watches that process (Linux only). The same command with a toy model says what all takes without
weights.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.floor import Shape
from benchmarks.memory import kilobytes
from benchmarks.models import QUICK, random_llava, sample_image

ROOT = Path(__file__).parents[1]
NARROW = Shape(hidden=2048, mlp=5504, heads=16)
"""Layers of a quarter of LLaVA-1.5-7B's, a vision tower of its size."""
EVERY = 0.01  # seconds between two looks


@dataclass(frozen=True)
class Watched:
    """What was seen of a process.

    Args:
        first_line, bar: when something, and when a bar, was on the screen: seconds, and CPU seconds by then.
        own, resident: bytes at the height, without and with the pages of mapped files.
    """

    first_line: tuple[float, float] | None
    bar: tuple[float, float] | None
    own: int
    resident: int


def watched(command: Sequence[str], folder: Path, bar: str = "Loading weights") -> Watched:
    """Run a command, with its output in a file of that folder, and look at it every `EVERY` seconds."""
    output, begun = folder / "output.txt", time.monotonic()
    first, shown, own, resident = None, None, 0, 0
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        place = Path(f"/proc/{process.pid}")
        while process.poll() is None:
            said = output.read_bytes()
            try:
                now = time.monotonic() - begun, _cpu_seconds(place / "stat")
                anonymous, mapped = (kilobytes(place / "status", name) for name in ("RssAnon", "RssFile"))
            except (OSError, AssertionError):  # it has just ended
                continue
            first = first or (now if said else None)
            shown = shown or (now if bar.encode() in said else None)
            own, resident = max(own, anonymous), max(resident, anonymous + mapped)
            time.sleep(EVERY)
    if process.returncode:
        raise RuntimeError(output.read_text()[-2000:])
    return Watched(first, shown, own, resident)


def _cpu_seconds(stat: Path) -> float:
    """Of a process, in its own code and in the system's."""
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def grounding(folder: Path, shape: Shape, dtype: str) -> tuple[int, Watched]:
    """Bytes of the weights, and what was seen of grounding with them."""
    lvlm = random_llava(shape, torch.device("cpu"), torch.bfloat16)
    for part in (lvlm.model, lvlm.processor):
        part.save_pretrained(folder)
    del lvlm
    image = folder / "image.png"
    sample_image().save(image)
    asked = [f"model.name={folder}", f"model.dtype={dtype}", "device=cpu", "segmenter=none"]
    asked.append(f"heads=[{shape.layers - 1}-0]")  # all layers are run
    where = [f"image_file={image}", "query=the red car", f"output_dir={folder / 'out'}"]
    command = [sys.executable, "-u", "localization_heads_finder.py", "stage=ground", *asked, *where]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return size, watched(command, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="auto", help="model.dtype of the command")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        _, toy = grounding(Path(first), QUICK, given.dtype)
        size, seen = grounding(Path(second), replace(NARROW, layers=given.layers), given.dtype)
    beyond, own = seen.resident - toy.resident, seen.own - toy.own
    lines = [
        f"weights {size / 1e6:,.0f} MB; first line {_when(seen.first_line)}, bar {_when(seen.bar)}",
        f"memory at its height, beyond the same command with a toy model: {beyond / 1e6:,.0f} MB, "
        f"{beyond / size:.2f} of the weights; {own / 1e6:,.0f} MB of it without the mapped file",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _when(moment: tuple[float, float] | None) -> str:
    return "never" if moment is None else "after {:.1f} s ({:.1f} s of CPU)".format(*moment)


if __name__ == "__main__":
    main()

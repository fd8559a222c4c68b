"""Loading of a large checkpoint: seconds until the first output appears, and peak memory.

`python -m benchmarks.loading` writes a LLaVA with random bfloat16 weights, grounds with it in a subprocess, and samples
that process (Linux only). The same command with a toy model is the baseline, subtracted from the memory.
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
from benchmarks.memory import proc_bytes
from benchmarks.models import QUICK, random_llava, sample_image

ROOT = Path(__file__).parents[1]
NARROW = Shape(hidden=2048, mlp=5504, heads=16)
"""Decoder layers with a quarter of LLaVA-1.5-7B's weights, and a vision tower of its size."""
SAMPLING_SECONDS = 0.01


@dataclass(frozen=True)
class ProcessProfile:
    """What was measured of a process.

    Args:
        first_line, bar: when the first output and the progress bar appeared: wall and CPU seconds; None if never.
        anonymous, resident: peak bytes without and with the pages of memory-mapped files.
    """

    first_line: tuple[float, float] | None
    bar: tuple[float, float] | None
    anonymous: int
    resident: int


def profile_command(command: Sequence[str], folder: Path, bar: str = "Loading weights") -> ProcessProfile:
    """Run a command with its output in a file in `folder`, sampling time and memory as it runs."""
    output, start = folder / "output.txt", time.monotonic()
    first_line, bar_shown, peak_anonymous, peak_resident = None, None, 0, 0
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        proc = Path(f"/proc/{process.pid}")
        while process.poll() is None:
            text = output.read_bytes()
            try:
                now = time.monotonic() - start, _cpu_seconds(proc / "stat")
                anonymous, mapped = (proc_bytes(proc / "status", name) for name in ("RssAnon", "RssFile"))
            except (OSError, AssertionError):  # the process has just ended
                continue
            first_line = first_line or (now if text else None)
            bar_shown = bar_shown or (now if bar.encode() in text else None)
            peak_anonymous = max(peak_anonymous, anonymous)
            peak_resident = max(peak_resident, anonymous + mapped)
            time.sleep(SAMPLING_SECONDS)
    if process.returncode:
        raise RuntimeError(output.read_text()[-2000:])
    return ProcessProfile(first_line, bar_shown, peak_anonymous, peak_resident)


def _cpu_seconds(stat: Path) -> float:
    """User and system CPU seconds of a process."""
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def profile_grounding(folder: Path, shape: Shape, dtype: str) -> tuple[int, ProcessProfile]:
    """The bytes of a random LLaVA's weights, and the profile of a grounding command that loads them."""
    lvlm = random_llava(shape, torch.device("cpu"), torch.bfloat16)
    for part in (lvlm.model, lvlm.processor):
        part.save_pretrained(folder)
    del lvlm
    image = folder / "image.png"
    sample_image().save(image)
    options = [f"model.name={folder}", f"model.dtype={dtype}", "device=cpu", "segmenter=none"]
    options.append(f"heads=[{shape.layers - 1}-0]")  # a head of the last layer: no layer is skipped
    inputs = [f"image_file={image}", "query=the red car", f"output_dir={folder / 'out'}"]
    command = [sys.executable, "-u", "localization_heads_finder.py", "stage=ground", *options, *inputs]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return size, profile_command(command, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="auto", help="model.dtype of the command")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        _, toy = profile_grounding(Path(first), QUICK, options.dtype)
        size, large = profile_grounding(Path(second), replace(NARROW, layers=options.layers), options.dtype)
    resident, anonymous = large.resident - toy.resident, large.anonymous - toy.anonymous
    lines = [
        f"weights {size / 1e6:,.0f} MB; first line {_format_moment(large.first_line)}, bar {_format_moment(large.bar)}",
        f"memory at its height, beyond the same command with a toy model: {resident / 1e6:,.0f} MB, "
        f"{resident / size:.2f} of the weights; {anonymous / 1e6:,.0f} MB of it without the mapped file",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _format_moment(moment: tuple[float, float] | None) -> str:
    return "never" if moment is None else "after {:.1f} s ({:.1f} s of CPU)".format(*moment)


if __name__ == "__main__":
    main()

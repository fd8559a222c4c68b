"""Benchmarks on a GPU, with models of LLaVA-1.5-7B's and Qwen3-VL-8B's sizes and random weights: at most ten minutes.

    python -m benchmarks.gpu --json gpu.json --markdown gpu.md

Nothing is downloaded. Needs torch, transformers, numpy, scipy, Pillow, OpenCV and pydantic, but not Hydra. A part
begins only if there is time left, and the results are written after each part. `--toy` is a smoke test at toy size,
which also runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from benchmarks.capture import capture_rows, prefill
from benchmarks.early_exit import HEADS_LAYER, ground, whole_prefill
from benchmarks.floor import Shape
from benchmarks.memory import peak_bytes
from benchmarks.models import EXPRESSIONS, QUICK, random_llava, sample_image
from benchmarks.published import published_method
from benchmarks.qwen import CELL, TOY, QwenShape, random_qwen
from benchmarks.timing import Timings, synchronize, time_interleaved
from localization_heads.data.samples import Sample
from localization_heads.finding import find_heads
from localization_heads.lvlm.checks.doctor import compare_with_eager
from localization_heads.lvlm.forward.capture import Query
from localization_heads.lvlm.forward.failures import memory_errors
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import CriteriaOptions

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest allowed difference between captured and eager attention rows."""


@dataclass(frozen=True)
class Fact:
    """One row of the result; `goal` is an upper limit of `value`, or a lower one if `at_least`."""

    part: str
    what: str
    value: float | None
    unit: str = ""
    goal: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


@dataclass
class Bench:
    """What the parts share: the device, the sizes, the LLaVA in memory, and the facts so far."""

    device: torch.device
    toy: bool
    rounds: int
    facts: list[Fact] = field(default_factory=list)

    @cached_property
    def shape(self) -> Shape:
        return QUICK if self.toy else Shape()

    @cached_property
    def image(self) -> Image.Image:
        return sample_image()

    @cached_property
    def llava(self) -> LVLM:
        return random_llava(self.shape, self.device, torch.bfloat16)

    def time(self, **variants: Callable[[], Any]) -> Timings:
        return time_interleaved(variants, self.rounds, max_seconds=20)

    def ratio(self, timings: Timings, variant: str, other: str) -> float:
        return median(timings.ratios(variant, other))


def parity(bench: Bench) -> Iterator[Fact]:
    """Captured against eager attention rows on four layers, by precision and kernel."""
    kernels = ["sdpa", "eager", *(["flash_attention_2"] if find_spec("flash_attn") else [])]
    shape = QUICK if bench.toy else Shape(layers=4, hidden=1024, mlp=2752, heads=8)
    for dtype in (torch.float32, torch.bfloat16):
        lvlm = random_llava(shape, bench.device, dtype)
        inputs = lvlm.model_inputs([bench.image], [lvlm.prompt(EXPRESSIONS[0])])
        for kernel in kernels:
            if kernel.startswith("flash") and dtype == torch.float32:
                continue
            lvlm.model.model.language_model.set_attn_implementation(kernel)
            difference = compare_with_eager(lvlm, inputs, Query()).difference
            yield Fact(
                "parity",
                f"capture against eager, {kernel}, {_dtype_name(dtype)}",
                difference,
                "of weight 1",
                TOLERANCES[dtype],
            )
    if "flash_attention_2" not in kernels:
        yield Fact("parity", "flash attention", None, note="flash-attn is not installed: not run")


def prefill_cost(bench: Bench) -> Iterator[Fact]:
    """Capturing every head's row against a plain prefill, in time and memory."""
    yield from _capture_cost("llava", bench, bench.llava, bench.image)


def _capture_cost(part: str, bench: Bench, lvlm: LVLM, image: Image.Image) -> Iterator[Fact]:
    inputs = lvlm.model_inputs([image], [lvlm.prompt(EXPRESSIONS[0])])
    tokens = inputs["input_ids"].shape[1]
    timings = bench.time(capture=lambda: capture_rows(lvlm, inputs), prefill=lambda: prefill(lvlm, inputs))
    what = f"{tokens} tokens, {lvlm.name.partition(', ')[2]}"
    yield Fact(part, f"capture / plain sdpa prefill, {what}", bench.ratio(timings, "capture", "prefill"), "x", 1.02)
    yield Fact(part, "prefill", 1e3 * timings.median("prefill"), "ms")
    capture_peak, prefill_peak = (peak_bytes(lambda run=run: run(lvlm, inputs)) for run in (capture_rows, prefill))
    if capture_peak and prefill_peak:
        yield Fact(part, "the same: peak memory over the weights", capture_peak / prefill_peak, "x")


def published_way(bench: Bench) -> Iterator[Fact]:
    """Seven expressions of one image: the published procedure, against encoding the image seven times or once."""
    lvlm, image = bench.llava, bench.image

    def run_published() -> None:
        for text in EXPRESSIONS[: 1 if bench.toy else 2]:
            published_method(lvlm, lvlm.model_inputs([image], [lvlm.prompt(text)]))

    timings = bench.time(
        published=run_published,
        apart=lambda: [lvlm.attend(image, text) for text in EXPRESSIONS],
        shared=lambda: lvlm.encode_image(image).attend(EXPRESSIONS),
    )
    scale = len(EXPRESSIONS) / (1 if bench.toy else 2)
    for variant, goal in (("apart", 10.0), ("shared", 20.0)):
        value = scale * bench.ratio(timings, "published", variant)
        yield Fact("published", f"expressions a second, {variant} / published", value, "x", goal, at_least=True)
        yield Fact("published", f"expressions a second, {variant}", len(EXPRESSIONS) / timings.median(variant), "1/s")


def early_exit(bench: Bench) -> Iterator[Fact]:
    """Grounding with heads in layer 14, image to box, against the prefill that any generated answer begins with."""
    lvlm, last = bench.llava, HEADS_LAYER * bench.shape.layers // Shape().layers
    timings = bench.time(
        early=lambda: ground(lvlm, bench.image, last, last_layer=last),
        whole=lambda: whole_prefill(lvlm, bench.image),
    )
    yield Fact(
        "early",
        f"grounding that stops at layer {last} / prefill",
        bench.ratio(timings, "early", "whole"),
        "x",
        0.5,
    )


def discovery(bench: Bench) -> Iterator[Fact]:
    """`find_heads` end to end: expressions per second, and the share of the time spent in the model."""
    lvlm = bench.llava
    images = [_noise(seed) for seed in range(2 if bench.toy else 16)]
    samples = [Sample(image, text) for image in images for text in EXPRESSIONS]
    criteria = CriteriaOptions(exclude_layers=0 if bench.toy else 2)
    find_heads(lvlm, samples[: len(EXPRESSIONS)], criteria=criteria)
    start = perf_counter()
    find_heads(lvlm, samples, criteria=criteria)
    seconds = perf_counter() - start
    busy = _model_seconds(lvlm, samples)
    yield Fact("find", f"expressions a second, {len(EXPRESSIONS)} an image", len(samples) / seconds, "1/s")
    yield Fact("find", "share of that time in which the model is at work", busy / seconds, "", 0.85, at_least=True)


def _model_seconds(lvlm: LVLM, samples: Sequence[Sample]) -> float:
    """Seconds in the model alone, synchronised: encoding each image, then the rows of its expressions."""
    images = {id(sample.image): sample.image for sample in samples}
    total = 0.0
    for image in images.values():
        encoded = lvlm.encode_image(image)
        prompts = [encoded.prepare(text) for text in EXPRESSIONS]
        synchronize()
        start = perf_counter()
        encoded.encode()
        encoded.attend_prepared(prompts)
        synchronize()
        total += perf_counter() - start
    return total


def batches(bench: Bench) -> Iterator[Fact]:
    """The largest batch of images that fits, doubling up to 256."""
    lvlm, size, largest, rate = bench.llava, 1, 0, 0.0
    limit = 4 if bench.toy else 256
    while size <= limit:
        inputs = lvlm.model_inputs([bench.image] * size, [lvlm.prompt(EXPRESSIONS[0])] * size)
        try:
            with memory_errors():
                capture_rows(lvlm, inputs)
                start = perf_counter()
                capture_rows(lvlm, inputs)
                synchronize()
        except Exception as error:
            if "memory" not in str(error):
                raise
            torch.cuda.empty_cache()
            break
        largest, rate = size, size / (perf_counter() - start)
        size *= 2
    yield Fact("batch", f"largest batch that fits, of {limit} tried at most", largest, "images")
    yield Fact("batch", "its captures a second, images anew each", rate, "1/s")


def qwen(bench: Bench) -> Iterator[Fact]:
    """Capture and sharing with a model of Qwen3-VL-8B's shape, at 1,024 image tokens."""
    bench.__dict__.pop("llava", None)  # one model at a time
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    lvlm = random_qwen(TOY if bench.toy else QwenShape(), bench.device, torch.bfloat16)
    side = (4 if bench.toy else 32) * CELL
    image = _noise(0).resize((side, side))
    yield from _capture_cost("qwen", bench, lvlm, image)
    timings = bench.time(
        apart=lambda: [lvlm.attend(image, text) for text in EXPRESSIONS],
        shared=lambda: lvlm.encode_image(image).attend(EXPRESSIONS),
    )
    for variant in ("apart", "shared"):
        yield Fact("qwen", f"expressions a second, {variant}", len(EXPRESSIONS) / timings.median(variant), "1/s")


def cuda_tests(bench: Bench) -> Iterator[Fact]:
    """The tests that need a GPU."""
    what = "tests/test_gpu.py"
    missing = [name for name in ("pytest", "hypothesis", "hydra", "omegaconf") if find_spec(name) is None]
    if bench.device.type != "cuda" or missing:
        note = f"not run: no {missing[0]} here" if missing else "not run: no GPU"
        yield Fact("tests", what, None, note=note)
        return
    tests = Path(__file__).parents[1] / "tests" / "test_gpu.py"
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *parallel, str(tests)]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=tests.parents[1])
    summary = [line for line in completed.stdout.splitlines() if " passed" in line or line.startswith("FAILED")]
    yield Fact("tests", what, float(completed.returncode), "exit status", 0.0, note="; ".join(summary[-3:]))


PARTS = (parity, prefill_cost, published_way, early_exit, discovery, batches, qwen, cuda_tests)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    if not torch.cuda.is_available() and not options.toy:
        sys.stderr.write("error: no GPU found; use --toy to run everything at toy size on the CPU\n")
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench, start, failures = Bench(device, options.toy, options.rounds), perf_counter(), 0
    for part in PARTS:
        what = (part.__doc__ or "").splitlines()[0]
        if perf_counter() - start > 60 * options.minutes * 0.85:
            bench.facts.append(Fact(part.__name__, what, None, note="no time was left"))
            continue
        sys.stderr.write(f"{perf_counter() - start:5.0f} s  {what}\n")
        try:
            bench.facts.extend(part(bench))
        except Exception as error:  # the other parts still run
            failures += 1
            note = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            bench.facts.append(Fact(part.__name__, what, None, note=note))
        _write(options, bench)
    sys.stdout.write(markdown_table(bench.facts, _machine(bench)) + "\n")
    return 1 if failures else 0


def _write(options: argparse.Namespace, bench: Bench) -> None:
    machine = _machine(bench)
    if options.json:
        rows = [{**asdict(fact), "met": fact.met} for fact in bench.facts]
        Path(options.json).write_text(json.dumps({**machine, "facts": rows}, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        Path(options.markdown).write_text(markdown_table(bench.facts, machine) + "\n", encoding="utf-8")


def _machine(bench: Bench) -> dict[str, str]:
    on_gpu = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "no GPU",
        "memory": f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB" if on_gpu else "-",
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "sizes": "toy: nothing is measured" if bench.toy else "true",
    }


def markdown_table(facts: Sequence[Fact], machine: dict[str, str]) -> str:
    lines = ["| part | what | measured | goal |", "| --- | --- | --- | --- |"]
    for fact in facts:
        value = fact.note or "-" if fact.value is None else f"{fact.value:.3g} {fact.unit}".rstrip()
        sign, verdict = ">=" if fact.at_least else "<=", "met" if fact.met else "MISSED"
        goal = "" if fact.goal is None else f"{sign} {fact.goal:g} {verdict if fact.met is not None else ''}"
        lines.append(f"| {fact.part} | {fact.what} | {value} | {goal.strip()} |")
    return "\n".join(lines) + "\n\n" + ", ".join(f"{name} {value}" for name, value in machine.items())


def _noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (480, 640, 3), dtype=np.uint8))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the facts as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--minutes", type=float, default=10, help="no part begins after 85 %% of this time (10)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant is timed, at most (5)")
    parser.add_argument("--toy", action="store_true", help="toy sizes, as a smoke test; also runs on a CPU")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

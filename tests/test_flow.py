"""The loop over a data set: chunks, the pipeline of background threads, shared images, and lack of memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from front import (
    EXPRESSIONS,
    Calls,
    Front,
    draw_image,
    read_lines,
    stub_figures,
    write_data,
    write_lines,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from localization_heads.background import MAX_PENDING_BYTES, PREFETCH
from localization_heads.data.samples import Sample
from localization_heads.lvlm.forward.failures import memory_errors
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.sharing import EncodedImage
from localization_heads.stages.chunks import split_into_chunks
from localization_heads.stages.flow import run_pipelined

# ------------------------------------------------------------------------------------------------------ chunks


def samples_of(images: list[int]) -> list[Sample]:
    """One sample per number, which names its image; lines count from 1."""
    return [Sample(f"no_{n}.png", "x" * (line % 7 + 1), line=line) for line, n in enumerate(images, start=1)]


def lines_of(chunks: Iterable[Sequence[Sample]]) -> list[list[int]]:
    return [[sample.line for sample in chunk] for chunk in chunks]


@given(st.lists(st.integers(0, 9), max_size=200), st.integers(1, 9))
def test_chunks_are_a_stable_partition_by_image(images: list[int], size: int) -> None:
    """Each sample occurs once, no chunk is too large, and an image is in as few chunks as possible."""
    samples = samples_of(images)
    chunks = list(split_into_chunks(samples, size))
    assert sorted(sample.line for chunk in chunks for sample in chunk) == [sample.line for sample in samples]
    assert all(0 < len(chunk) <= size for chunk in chunks)
    assert chunks == list(split_into_chunks(samples, size))
    for image in set(images):
        with_image = [chunk for chunk in chunks if any(s.image == f"no_{image}.png" for s in chunk)]
        assert len(with_image) == -(-images.count(image) // size)


def test_samples_of_one_image_stay_together_in_file_order() -> None:
    chunks = split_into_chunks(samples_of([1, 2, 3, 1, 2, 3, 1, 2, 3]), 3)
    assert lines_of(chunks) == [[1, 4, 7], [2, 5, 8], [3, 6, 9]]


def test_samples_are_sorted_by_size_and_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pixels of the image, then by letters of the expression, within each window."""
    sides = [10, 40, 20, 30] * 2
    for number, side in enumerate(sides):
        draw_image(tmp_path / f"{number}.png", number, (side, side))
    samples = [Sample(str(tmp_path / f"{n}.png"), "x" * (9 - n), line=n) for n in range(len(sides))]
    assert lines_of(split_into_chunks(samples, 2)) == [[4, 0], [6, 2], [7, 3], [5, 1]]
    monkeypatch.setattr("localization_heads.stages.chunks.SORT_WINDOW", 2)
    assert lines_of(split_into_chunks(samples, 2)) == [[0, 2], [3, 1], [4, 6], [7, 5]]
    assert lines_of(split_into_chunks(samples, 1)) == [[n] for n in range(8)]


def test_images_in_memory_are_told_apart(image: Image.Image) -> None:
    other = image.rotate(180)
    samples = [Sample(one, "x", line=n) for n, one in enumerate([image, other, image, other])]
    assert lines_of(split_into_chunks(samples, 2)) == [[0, 2], [1, 3]]


def test_large_images_limit_a_chunk(tmp_path: Path) -> None:
    """To 24 megapixels, or one image with all its expressions, whatever `batch_size` is."""
    sizes = [(5000, 1600)] * 4 + [(8000, 8000)] + [(100, 100)] * 3
    for number, size in enumerate(sizes):
        Image.new("1", size).save(tmp_path / f"{number}.png")
    names = [str(tmp_path / f"{n}.png") for n in (0, 1, 2, 3, 4, 4, 5, 6, 7)] + ["http://a/b.png"] * 2
    chunks = split_into_chunks([Sample(name, "x", line=n) for n, name in enumerate(names)], 64)
    assert lines_of(chunks) == [[6, 7, 8, 0, 1], [2, 3], [9, 10], [4, 5]]


PEAK_MEMORY = """
import resource, sys
from localization_heads.apps.finder import finder
peaks, options = [], sys.argv[1].split()
for data in ("small.jsonl", "large.jsonl"):
    sys.argv = ["finder", f"data_file={data}", *options]
    assert finder() == 0
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Six camera images in one batch need less than 1 GB beyond what the model and a small image take."""
    for name, size, count in (("small", (64, 48), 1), ("large", (6000, 4000), 6)):
        entries = []
        for number in range(count):
            path = tmp_path / f"{name}_{number}.jpg"
            Image.new("RGB", size, (40 * number, 90, 90)).save(path)
            entries.append({"id": f"e{number}", "prompt": "the dog", "image_path": path.name})
        write_lines(tmp_path / f"{name}.jsonl", entries)
    options = "stage=ground device=cpu batch_size=64 heads=[2-0] segmenter=none visualize_batch=false"
    ended = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.splitlines()[-1]) < 1_000_000  # kilobytes


# ---------------------------------------------------------------------------------------------------- pipeline


@pytest.mark.parametrize("in_background", [True, False])
def test_run_pipelined_keeps_the_order(in_background: bool) -> None:
    """However long each step takes; and at most `PREFETCH` items wait before and after `compute`."""
    dice, log, finished = random.Random(0), list[tuple[str, int]](), list[int]()

    def step(name: str) -> Any:
        def run(item: int) -> int:
            time.sleep(dice.random() / 300)
            log.append((name, item))
            return item

        return run

    def finish(item: int) -> None:
        step("finish")(item)
        finished.append(item)

    run_pipelined(range(20), step("prepare"), step("compute"), finish, finish_in_background=in_background)
    assert finished == list(range(20))
    for name in ("prepare", "compute", "finish"):
        assert [item for step_name, item in log if step_name == name] == list(range(20))
    for item in range(20):
        computed = log.index(("compute", item))
        assert log.index(("prepare", item)) < computed < log.index(("finish", item))
        prefetched = sum(1 for name, n in log[:computed] if name == "prepare" and n > item)
        pending = item - sum(1 for name, _ in log[:computed] if name == "finish")
        assert prefetched <= PREFETCH + 1
        assert pending <= PREFETCH + 1


def test_run_pipelined_overlaps_the_steps() -> None:
    """Item 2 is prepared, item 1 computed and item 0 finished at the same time: all three meet at the barrier."""
    barrier, main_thread = threading.Barrier(3, timeout=20), threading.get_ident()
    background_threads = set()

    def prepare(item: int) -> int:
        background_threads.add(threading.get_ident())
        if item == 2:
            barrier.wait()
        return item

    def compute(item: int) -> int:
        assert threading.get_ident() == main_thread
        if item == 1:
            barrier.wait()
        return item

    def finish(item: int) -> None:
        background_threads.add(threading.get_ident())
        if item == 0:
            barrier.wait()

    run_pipelined(range(3), prepare, compute, finish)
    assert len(background_threads) == 2
    assert main_thread not in background_threads


def test_run_pipelined_finishes_a_large_item_before_the_next_is_computed() -> None:
    finished = list[int]()

    def compute(item: int) -> int:
        assert finished == list(range(item))
        return item

    run_pipelined(range(6), same, compute, finished.append, num_bytes=lambda _: MAX_PENDING_BYTES + 1)
    assert finished == list(range(6))


def same(item: int) -> int:
    return item


def test_run_pipelined_raises_the_error_of_the_last_item() -> None:
    """Although no later item waits for it."""
    with pytest.raises(ZeroDivisionError):
        run_pipelined(range(4), same, same, lambda item: 1 // (item - 3))


def test_run_pipelined_can_finish_in_the_main_thread() -> None:
    """For what opens windows or runs the model; `prepare` still runs in the background."""
    threads = list[tuple[str, int]]()

    def record(step: str) -> Any:
        return lambda _: threads.append((step, threading.get_ident()))

    run_pipelined(range(3), record("prepare"), record("compute"), record("finish"), finish_in_background=False)
    in_main = {step for step, thread in threads if thread == threading.get_ident()}
    assert in_main == {"compute", "finish"}
    assert len(threads) == 9


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("failing", ["prepare", "compute", "finish"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_run_pipelined_raises_and_finishes_what_was_computed(
    in_background: bool, failing: str, error: type[BaseException]
) -> None:
    computed, finished = list[int](), list[int]()

    def step(name: str, item: int) -> int:
        if name == failing and item == 3:
            raise error("no")
        return item

    def compute(item: int) -> int:
        computed.append(step("compute", item))
        time.sleep(0.001)
        return item

    def finish(item: int) -> None:
        time.sleep(0.002)
        finished.append(step("finish", item))

    with pytest.raises(error, match="no"):
        run_pipelined(range(50), partial(step, "prepare"), compute, finish, finish_in_background=in_background)
    assert len(computed) < 10
    assert finished == [item for item in computed if (failing, item) != ("finish", 3)]


# ----------------------------------------------------------------------------------------------- shared images


SHARED = "data_file=shared.jsonl"


def write_shared_images(folder: Path) -> None:
    """Eight expressions of three images, those of one image not adjacent; one of the images is broken."""
    for number in range(2):
        draw_image(folder / f"image_{number}.png", number)
    (folder / "broken.png").write_bytes((folder / "image_0.png").read_bytes()[:100])
    names = ["image_0", "image_1", "broken", "image_0", "image_1", "broken", "image_0", "image_1"]
    entries = [
        {"id": f"entry_{n}", "prompt": EXPRESSIONS[n % len(EXPRESSIONS)], "image_path": f"{name}.png"}
        for n, name in enumerate(names)
    ]
    write_lines(folder / "shared.jsonl", entries)


@pytest.fixture
def expressions_per_image(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many expressions each encoded image was asked."""
    original, counts = EncodedImage.attend_prepared, []

    def spy(self: EncodedImage, questions: Any, last_layer: int | None) -> Any:
        counts.append(len(questions))
        return original(self, questions, last_layer)

    monkeypatch.setattr(EncodedImage, "attend_prepared", spy)
    return counts


@pytest.mark.parametrize("stage", ["find", "batch", "ground"])
def test_entries_of_one_image_share_its_encoding(
    front: Front, monkeypatch: pytest.MonkeyPatch, expressions_per_image: list[int], stage: str
) -> None:
    """The results are those of one entry at a time, but for rounding; a broken image fails both its entries."""
    stub_figures(monkeypatch)
    write_shared_images(front.folder)
    for size, output_dir in ((4, "together"), (1, "alone")):
        options = (f"stage={stage}", SHARED, "heads=[2-0,3-1]", f"batch_size={size}")
        assert front.finder(*options, f"output_dir={output_dir}").status == 1
        assert expressions_per_image == [3, 3]
    together, alone = Path("together/tiny"), Path("alone/tiny")
    if stage != "ground":
        one, two = (json.loads((f / "heads.json").read_text())["heads"] for f in (together, alone))
        assert [(h["layer"], h["head"]) for h in one] == [(h["layer"], h["head"]) for h in two]
        for h, other in zip(one, two, strict=True):
            assert h["attention_sum"] == pytest.approx(other["attention_sum"], abs=1e-5)
    if stage != "find":
        lines, others = (read_lines(f / "predictions.jsonl") for f in (together, alone))
        assert [line["id"] for line in lines] == [line["id"] for line in others]
        good = [line["id"] for line in lines if line["error"] is None]
        assert good == [f"entry_{n}" for n in (0, 1, 3, 4, 6, 7)]
        for line, other in zip(lines, others, strict=True):
            assert line["bbox"] == (other["bbox"] and pytest.approx(other["bbox"], abs=0.5))


@pytest.mark.parametrize("stage", ["find", "batch", "ground"])
def test_a_run_over_shared_images_resumes(
    front: Front, calls: Calls, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Interrupted in the second chunk, it keeps the first, and ends with the same bytes."""
    stub_figures(monkeypatch)
    write_shared_images(front.folder)
    options = (f"stage={stage}", SHARED, "heads=[2-0]", "batch_size=4")
    assert front.finder(*options, "output_dir=whole").status == 1
    calls.restart(fail_at=1)
    assert front.finder(*options).status == 130
    calls.fail_at = None
    assert front.finder(*options).status == 1
    assert calls.sizes == [3, 3]
    name = "heads.json" if stage == "find" else "predictions.jsonl"
    assert (front.out / name).read_bytes() == Path("whole/tiny", name).read_bytes()


# ------------------------------------------------------------------------------------------------------ memory


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory for a batch of two; the sizes of all batches tried."""
    original, sizes = LVLM.capture_rows, []

    def capture_rows(self: LVLM, inputs: Any, *arguments: Any, **named: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        with memory_errors():
            if sizes[-1] > 2:
                raise random.Random(len(sizes)).choice(
                    [
                        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
                        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
                        RuntimeError("MPS backend out of memory"),
                        MemoryError(),
                    ]
                )
        return original(self, inputs, *arguments, **named)

    monkeypatch.setattr(LVLM, "capture_rows", capture_rows)
    return sizes


@pytest.mark.parametrize("stage", ["find", "ground"])
def test_auto_halves_the_batch_until_it_fits(
    front: Front, monkeypatch: pytest.MonkeyPatch, small_memory: list[int], stage: str
) -> None:
    """Later chunks start with the size that fitted; the boxes are those of `batch_size=1`."""
    stub_figures(monkeypatch)
    monkeypatch.setattr("localization_heads.stages.run.AUTO_BATCH_SIZE", 5)
    write_data(front.folder, 10)
    options = (f"stage={stage}", "data_file=data.jsonl", "heads=[2-0]")
    result = front.succeed(*options, "batch_size=auto")
    assert small_memory == [5, 3, 2, 1, 2, 2, 2, 1]
    assert "going on with 2 entries at a time" in result.err
    front.succeed(*options, "batch_size=1", "output_dir=one")
    if stage == "ground":
        boxes = [line["bbox"] for line in front.lines()]
        others = [line["bbox"] for line in read_lines("one/tiny/predictions.jsonl")]
        assert boxes == [pytest.approx(box, abs=0.5) for box in others]


def test_a_fixed_batch_size_that_does_not_fit_suggests_auto(front: Front, small_memory: list[int]) -> None:
    write_data(front.folder, 5)
    assert "batch_size=auto" in front.error("stage=find", "data_file=data.jsonl", "batch_size=4", status=1)
    assert small_memory == [4]


@pytest.mark.parametrize(
    ("error", "in_report"),
    [(torch.OutOfMemoryError("CUDA out of memory"), 0), (RuntimeError("sizes do not match"), 3)],
)
def test_only_errors_of_the_memory_end_the_run(
    front: Front, monkeypatch: pytest.MonkeyPatch, error: Exception, in_report: int
) -> None:
    """If not even one entry fits. Other errors fail their entries, one by one."""

    def forward(*_: Any, **__: Any) -> None:
        raise error

    write_data(front.folder, 3)
    monkeypatch.setattr("transformers.LlavaModel.forward", forward)
    result = front.finder("stage=find", "data_file=data.jsonl", "batch_size=auto")
    assert result.status == 1
    assert result.out.count("sizes do not match") == in_report
    assert ("out of memory" in result.err) == (not in_report)

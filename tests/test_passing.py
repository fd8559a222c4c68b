"""The model's way through a data set: how it is cut, what runs beside what, and what happens when memory ends."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
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
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.sharing import EncodedImage
from localization_heads.stages.chunks import split_into_chunks
from localization_heads.stages.flow import run_pipelined

# ------------------------------------------------------------------------------------------------ how it is cut


def samples_of(images: list[int]) -> list[Sample]:
    return [Sample(f"no_{n}.png", "x" * (line % 7 + 1), line=line) for line, n in enumerate(images, start=1)]


@given(st.lists(st.integers(0, 9), max_size=200), st.integers(1, 9))
def test_chunks(images: list[int], size: int) -> None:
    """Every sample once, none too large, the same each time, and few chunks for each image."""
    samples = samples_of(images)
    cut = list(split_into_chunks(samples, size))
    assert sorted(sample.line for chunk in cut for sample in chunk) == [sample.line for sample in samples]
    assert all(0 < len(chunk) <= size for chunk in cut)
    assert cut == list(split_into_chunks(samples, size))
    for image in set(images):
        holding = [chunk for chunk in cut if any(s.image == f"no_{image}.png" for s in chunk)]
        assert len(holding) == -(-images.count(image) // size)


def test_an_image_of_many_places_is_one_group() -> None:
    """Entries far apart in the file, in file order among themselves."""
    (first, second, third) = split_into_chunks(samples_of([1, 2, 3, 1, 2, 3, 1, 2, 3]), 3)
    assert [[s.line for s in chunk] for chunk in (first, second, third)] == [[1, 4, 7], [2, 5, 8], [3, 6, 9]]


def test_images_of_like_size_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header tells, then the expression's letters; the next window begins anew."""
    sides = [10, 40, 20, 30] * 2
    for number, side in enumerate(sides):
        draw_image(tmp_path / f"{number}.png", number, (side, side))
    samples = [Sample(str(tmp_path / f"{n}.png"), "x" * (9 - n), line=n) for n in range(len(sides))]
    cut = [[sample.line for sample in chunk] for chunk in split_into_chunks(samples, 2)]
    assert cut == [[4, 0], [6, 2], [7, 3], [5, 1]]
    monkeypatch.setattr("localization_heads.stages.chunks.SORT_WINDOW", 2)
    cut = [[sample.line for sample in chunk] for chunk in split_into_chunks(samples, 2)]
    assert cut == [[0, 2], [3, 1], [4, 6], [7, 5]]
    assert [[s.line for s in chunk] for chunk in split_into_chunks(samples, 1)] == [[n] for n in range(8)]


def test_images_in_memory_are_not_mixed_up(image: Image.Image) -> None:
    other = image.rotate(180)
    samples = [Sample(one, "x", line=n) for n, one in enumerate([image, other, image, other])]
    assert [[s.line for s in chunk] for chunk in split_into_chunks(samples, 2)] == [[0, 2], [1, 3]]


def test_large_images_fill_a_chunk_by_themselves(tmp_path: Path) -> None:
    """24 megapixels at most, whatever `batch_size`; or one image, with all that is asked about it."""
    sizes = [(5000, 1600)] * 4 + [(8000, 8000)] + [(100, 100)] * 3
    for number, size in enumerate(sizes):
        Image.new("1", size).save(tmp_path / f"{number}.png")
    names = [str(tmp_path / f"{n}.png") for n in (0, 1, 2, 3, 4, 4, 5, 6, 7)] + ["http://a/b.png"] * 2
    cut = split_into_chunks([Sample(name, "x", line=n) for n, name in enumerate(names)], 64)
    assert [[s.line for s in chunk] for chunk in cut] == [[6, 7, 8, 0, 1], [2, 3], [9, 10], [4, 5]]


MEASURED = """
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
    """Six images of a camera in one batch: below 1 GB beyond what the model and a small image take."""
    for name, size, count in (("small", (64, 48), 1), ("large", (6000, 4000), 6)):
        entries = []
        for number in range(count):
            path = tmp_path / f"{name}_{number}.jpg"
            Image.new("RGB", size, (40 * number, 90, 90)).save(path)
            entries.append({"id": f"e{number}", "prompt": "the dog", "image_path": path.name})
        write_lines(tmp_path / f"{name}.jsonl", entries)
    options = "stage=ground device=cpu batch_size=64 heads=[2-0] segmenter=none visualize_batch=false"
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.splitlines()[-1]) < 1_000_000  # kilobytes


# ------------------------------------------------------------------------------------------------ the three hands


@pytest.mark.parametrize("behind", [True, False])
def test_in_line_keeps_the_order(behind: bool) -> None:
    """Whatever takes how long; and no more than `PREFETCH` wait on either side."""
    dice, log, done = random.Random(0), list[tuple[str, int]](), list[int]()

    def step(name: str) -> Any:
        def work(item: int) -> int:
            time.sleep(dice.random() / 300)
            log.append((name, item))
            return item

        return work

    def finish(item: int) -> None:
        step("finish")(item)
        done.append(item)

    run_pipelined(range(20), step("prepare"), step("compute"), finish, finish_in_background=behind)
    assert done == list(range(20))
    for name in ("prepare", "compute", "finish"):
        assert [item for what, item in log if what == name] == list(range(20))
    for item in range(20):
        computed = log.index(("compute", item))
        assert log.index(("prepare", item)) < computed < log.index(("finish", item))
        before = sum(1 for what, n in log[:computed] if what == "prepare" and n > item)
        waiting = item - sum(1 for what, _ in log[:computed] if what == "finish")
        assert before <= PREFETCH + 1
        assert waiting <= PREFETCH + 1


def test_in_line_works_at_the_same_time() -> None:
    """While one is computed the next is prepared and the last finished: the three meet."""
    meeting, here = threading.Barrier(3, timeout=20), threading.get_ident()
    threads = set()

    def meet(item: int) -> int:
        threads.add(threading.get_ident())
        if item == 2:
            meeting.wait()
        return item

    def compute(item: int) -> int:
        assert threading.get_ident() == here
        if item == 1:
            meeting.wait()
        return item

    def finish(item: int) -> None:
        threads.add(threading.get_ident())
        if item == 0:
            meeting.wait()

    run_pipelined(range(3), meet, compute, finish)
    assert len(threads) == 2
    assert here not in threads


def test_in_line_lets_nothing_heavy_wait() -> None:
    """What is larger than may wait is finished before the next is computed."""
    done = list[int]()

    def compute(item: int) -> int:
        assert done == list(range(item))
        return item

    run_pipelined(
        range(6), lambda item: item, compute, done.append, num_bytes=lambda _: MAX_PENDING_BYTES + 1
    )
    assert done == list(range(6))


def test_in_line_hands_on_what_goes_wrong_at_the_very_end() -> None:
    """Nobody asks for the last results any more: their errors count all the same."""
    with pytest.raises(ZeroDivisionError):
        run_pipelined(range(4), lambda item: item, lambda item: item, lambda item: 1 // (item - 3))


def test_in_line_without_a_thread_behind() -> None:
    """What opens windows, or runs the model, stays in this thread; what is prepared does not."""
    seen = list[tuple[str, int]]()
    run_pipelined(
        range(3),
        lambda _: seen.append(("prepare", threading.get_ident())),
        lambda _: seen.append(("compute", threading.get_ident())),
        lambda _: seen.append(("finish", threading.get_ident())),
        finish_in_background=False,
    )
    here = threading.get_ident()
    assert {what for what, thread in seen if thread == here} == {"compute", "finish"}
    assert len(seen) == 9


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("where", ["prepare", "compute", "finish"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_in_line_hands_on_what_goes_wrong(behind: bool, where: str, error: type[BaseException]) -> None:
    """And what was computed before is finished."""
    computed, done = list[int](), list[int]()

    def step(name: str, item: int) -> int:
        if name == where and item == 3:
            raise error("no")
        return item

    def compute(item: int) -> int:
        computed.append(step("compute", item))
        time.sleep(0.001)
        return item

    def finish(item: int) -> None:
        time.sleep(0.002)
        done.append(step("finish", item))

    with pytest.raises(error, match="no"):
        run_pipelined(
            range(50), lambda item: step("prepare", item), compute, finish, finish_in_background=behind
        )
    assert len(computed) < 10
    assert done == [item for item in computed if (where, item) != ("finish", 3)]


# ------------------------------------------------------------------------------------ a data set of few images


def write_shared(folder: Path) -> str:
    """Seven expressions of three images, those of one not adjacent; one of the images is broken."""
    for number in range(2):
        draw_image(folder / f"image_{number}.png", number)
    (folder / "broken.png").write_bytes((folder / "image_0.png").read_bytes()[:100])
    names = ["image_0", "image_1", "broken", "image_0", "image_1", "broken", "image_0", "image_1"]
    entries = [
        {"id": f"entry_{n}", "prompt": EXPRESSIONS[n % len(EXPRESSIONS)], "image_path": f"{name}.png"}
        for n, name in enumerate(names)
    ]
    write_lines(folder / "shared.jsonl", entries)
    return "data_file=shared.jsonl"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many expressions each encoded image was asked."""
    original, asked = EncodedImage.attend_prepared, []

    def spy(self: EncodedImage, questions: Any, last_layer: int | None) -> Any:
        asked.append(len(questions))
        return original(self, questions, last_layer)

    monkeypatch.setattr(EncodedImage, "attend_prepared", spy)
    return asked


@pytest.mark.parametrize("stage", ["find", "batch", "ground"])
def test_entries_of_one_image_share_it(
    front: Front, monkeypatch: pytest.MonkeyPatch, encoded: list[int], stage: str
) -> None:
    """Results as one by one, but for rounding, in file order; the broken image fails both of its entries."""
    stub_figures(monkeypatch)
    data, heads = write_shared(front.folder), "heads=[2-0,3-1]"
    assert front.finder(f"stage={stage}", data, heads, "batch_size=4").status == 1
    assert encoded == [3, 3]
    assert front.finder(f"stage={stage}", data, heads, "batch_size=1", "output_dir=alone").status == 1
    assert encoded == [3, 3]
    if stage != "ground":
        one, two = (
            json.loads((f / "heads.json").read_text())["heads"] for f in (front.out, Path("alone/tiny"))
        )
        assert [(h["layer"], h["head"]) for h in one] == [(h["layer"], h["head"]) for h in two]
        for h, other in zip(one, two, strict=True):
            assert h["attention_sum"] == pytest.approx(other["attention_sum"], abs=1e-5)
    if stage != "find":
        together, alone = (
            read_lines(front.out / "predictions.jsonl"),
            read_lines(Path("alone/tiny") / "predictions.jsonl"),
        )
        assert [line["id"] for line in together] == [line["id"] for line in alone]
        assert [line["id"] for line in together if line["error"] is None] == [
            f"entry_{n}" for n in (0, 1, 3, 4, 6, 7)
        ]
        for line, other in zip(together, alone, strict=True):
            assert line["bbox"] == (other["bbox"] and pytest.approx(other["bbox"], abs=0.5))


@pytest.mark.parametrize("stage", ["find", "batch", "ground"])
def test_shared_images_resume(
    front: Front, calls: Calls, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Interrupted in the second chunk: the first is kept, and the end is the same to the byte."""
    stub_figures(monkeypatch)
    data = write_shared(front.folder)
    options = (f"stage={stage}", data, "heads=[2-0]", "batch_size=4")
    assert front.finder(*options, "output_dir=whole").status == 1
    calls.restart(fail_at=1)
    assert front.finder(*options).status == 130
    calls.fail_at = None
    assert front.finder(*options).status == 1
    assert calls.sizes == [3, 3]
    name = "heads.json" if stage == "find" else "predictions.jsonl"
    assert (front.out / name).read_bytes() == (Path("whole/tiny") / name).read_bytes()


# ------------------------------------------------------------------------------------------------------ memory


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A model that has no memory for more than two entries at a time."""
    original, tried = LVLM.capture_rows, []

    def full(self: LVLM, inputs: Any, *arguments: Any, **named: Any) -> Any:
        from localization_heads.lvlm.forward.failures import memory_errors

        tried.append(len(inputs["input_ids"]))
        with memory_errors():
            if tried[-1] > 2:
                raise random.Random(len(tried)).choice(
                    [
                        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
                        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
                        RuntimeError("MPS backend out of memory"),
                        MemoryError(),
                    ]
                )
        return original(self, inputs, *arguments, **named)

    monkeypatch.setattr(LVLM, "capture_rows", full)
    return tried


@pytest.mark.parametrize("stage", ["find", "ground"])
def test_auto_halves_until_it_fits(
    front: Front, monkeypatch: pytest.MonkeyPatch, small_memory: list[int], stage: str
) -> None:
    """All five, then three, then two, one of each side; later chunks begin with what fitted."""
    stub_figures(monkeypatch)
    monkeypatch.setattr("localization_heads.stages.run.AUTO_BATCH_SIZE", 5)
    write_data(front.folder, 10)
    options = (f"stage={stage}", "data_file=data.jsonl", "heads=[2-0]")
    result = front.succeed(*options, "batch_size=auto")
    assert small_memory == [5, 3, 2, 1, 2, 2, 2, 1]
    assert "going on with 2 entries at a time" in result.err
    small_memory.clear()
    front.succeed(*options, "batch_size=1", "output_dir=one")
    if stage == "ground":
        boxes, others = (
            [line["bbox"] for line in read_lines(f / "predictions.jsonl")]
            for f in (front.out, Path("one/tiny"))
        )
        assert boxes == [pytest.approx(box, abs=0.5) for box in others]


def test_a_given_size_fails_with_the_way_out(front: Front, small_memory: list[int]) -> None:
    write_data(front.folder, 5)
    assert "batch_size=auto" in front.error("stage=find", "data_file=data.jsonl", "batch_size=4", status=1)
    assert small_memory == [4]


def test_not_even_one_fits(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    write_data(front.folder, 3)
    monkeypatch.setattr("transformers.LlavaModel.forward", full)
    result = front.finder("stage=find", "data_file=data.jsonl", "batch_size=auto")
    assert result.status == 1
    assert "out of memory" in result.err


def test_other_errors_are_no_lack_of_memory(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """They put their entries aside, one by one."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("sizes do not match")

    write_data(front.folder, 3)
    monkeypatch.setattr("transformers.LlavaModel.forward", broken)
    result = front.finder("stage=find", "data_file=data.jsonl", "batch_size=auto")
    assert result.status == 1
    assert result.out.count("sizes do not match") == 3

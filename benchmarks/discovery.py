"""(g) Peak memory of `find` over very many expressions of a model with 32 x 32 heads, above what was used before it.

The real stage resumes a run that was killed after nine tenths of the samples: it reads the data file and the stored
statistics, processes the remaining samples, ranks the heads over all of them and draws the figures. Only the model is a
stub with small random maps, so that its size and speed do not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from benchmarks.memory import reset_peak, resident_peak
from benchmarks.result import Row, bytes_text, limit_row
from benchmarks.setting import Setting
from localization_heads.attention import AttentionMaps
from localization_heads.options.groups import ModelSpec

KEY = "g"
LIMIT = 300_000_000  # bytes
EXPRESSIONS = 100_000
EXPRESSIONS_PER_IMAGE = 7
ROOT = Path(__file__).parents[1]


def rows(setting: Setting) -> list[Row]:
    """Measured in a subprocess: memory left behind by other benchmarks would hide what `find` takes."""
    count = 700 if setting.quick else EXPRESSIONS
    what = f"find over {count:,} expressions, 1,024 heads, all of them ranked: memory beyond the model / limit"
    if not sys.platform.startswith("linux"):
        return [Row(KEY, what, note="measured on Linux only")]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), count)
        peak = json.loads(_measure_in_subprocess(folder, count))["peak"]
    return [limit_row(KEY, what, peak, LIMIT, bytes_text)]


def _measure_in_subprocess(folder: str, count: int) -> bytes:
    command = [sys.executable, "-m", "benchmarks.discovery", folder, str(count)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


def prepare(folder: Path, count: int) -> None:
    """Write the data and the partial statistics of a small run, for warming up, and of the large one."""
    for number in (EXPRESSIONS_PER_IMAGE, count):
        data = write_data(folder / str(number), number)
        store_statistics(stub_run(data, number), number * 9 // 10)


def measure(folder: Path, count: int) -> None:
    """Run `find` on both and print the peak memory of the large run, as JSON."""
    from localization_heads.stages.find import find

    for number in (EXPRESSIONS_PER_IMAGE, count):  # the small run first: it does the imports
        run = stub_run(folder / str(number) / "data.jsonl", number)
        before = reset_peak()
        result = find(run)
        peak = resident_peak() - before
        assert result.ranking.num_samples == number
    sys.stdout.write(json.dumps({"peak": peak}))


def write_data(folder: Path, count: int) -> Path:
    """Write `data.jsonl` with `count` expressions and their small images, and return its path."""
    folder.mkdir()
    with (folder / "data.jsonl").open("w") as file:
        for number in range(count):
            image = f"image_{number // EXPRESSIONS_PER_IMAGE:06}.png"
            if number % EXPRESSIONS_PER_IMAGE == 0:
                Image.new("RGB", (8, 6), (number % 256, 0, 0)).save(folder / image)
            expression = f"the person number {number} to the left of the red car"
            entry = {
                "id": f"expression_{number}",
                "prompt": expression,
                "image_path": image,
                "bbox": [0, 0, 5, 5],
            }
            file.write(json.dumps(entry) + "\n")
    return folder / "data.jsonl"


def stub_run(data: Path, count: int) -> Any:
    """A run with the finder's options, composed as the command composes them, and a stub model."""
    from localization_heads.options.compose import compose_options
    from localization_heads.stages.run import Run

    out = f"output_dir={data.parent / 'out'}"
    run = Run(compose_options("finder", f"data_file={data}", out, f"num_samples={count}", "batch_size=64"))
    run.__dict__["lvlm"] = StubModel()  # sets the cached property
    return run


def store_statistics(run: Any, count: int) -> None:
    """Store random statistics of the first `count` samples, as a killed run would leave them."""
    from localization_heads.stages.entries import load_entries
    from localization_heads.stages.statistics import open_statistics

    entries, store, rng = load_entries(run), open_statistics(run), np.random.default_rng(1)
    for start in range(0, count, 1000):
        samples = entries.samples[start : min(start + 1000, count)]
        sums, area, mass = (rng.random((len(samples), 32, 32), dtype=np.float32) for _ in range(3))
        store.append([entries.key(sample) for sample in samples], sums, area, mass, sums > 0.9)


class StubModel:
    """The part of the `LVLM` interface that `find` uses, with random maps."""

    name, fingerprint, system, conv_mode, query_token, view = (
        "stand-in",
        "",
        "",
        "referseg",
        "last",
        "combined",
    )
    num_layers = num_heads = 32
    num_parameters = 0
    spec = ModelSpec(name)
    extra_settings: ClassVar[dict[str, Any]] = {}
    processor = SimpleNamespace(tokenizer=SimpleNamespace(unk_token_id=None))

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def with_num_images(self, _: int) -> StubModel:
        return self

    def prompt(self, expression: str) -> str:
        return expression

    def can_prepare(self, _: object) -> bool:
        return True

    def attend_batch(self, images: Sequence[Image.Image], expressions: Sequence[str], **_: Any) -> list[Any]:
        maps = (self.rng.random((32, 32, 3, 3), dtype=np.float32) for _ in images)
        return [AttentionMaps(weights, image_box=(0, 0, 3, 3), image_size=(3, 3)) for weights in maps]


if __name__ == "__main__":
    measure(Path(sys.argv[1]), int(sys.argv[2]))

"""(g) The memory of `find` over very many expressions of a model of 32 x 32 heads, beyond what was there before it.

The real stage runs, as after a kill at nine tenths: it reads the data file and the store, goes through the last tenth
(images, analysis, appending), ranks the heads over every sample and draws the figures. Only the model is a stand-in,
whose maps are small and random, so that the size of the model and its speed play no part.
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
AN_IMAGE = 7
ROOT = Path(__file__).parents[1]


def rows(setting: Setting) -> list[Row]:
    """Measured in a process of its own: memory that others have left behind would hide what `find` takes."""
    count = 700 if setting.quick else EXPRESSIONS
    what = (
        f"find over {count:,} expressions, 1,024 heads, all of them ranked: memory beyond the model / limit"
    )
    if not sys.platform.startswith("linux"):
        return [Row(KEY, what, note="measured on Linux only")]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), count)
        peak = json.loads(_measured(folder, count))["peak"]
    return [limit_row(KEY, what, peak, LIMIT, bytes_text)]


def _measured(folder: str, count: int) -> bytes:
    command = [sys.executable, "-m", "benchmarks.discovery", folder, str(count)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


def prepare(folder: Path, count: int) -> None:
    """The data and the store of a small run and of the large one."""
    for number in (AN_IMAGE, count):
        data = write_data(folder / str(number), number)
        fill_store(stand_in_run(data, number), number * 9 // 10)


def measure(folder: Path, count: int) -> None:
    from localization_heads.stages.find import find

    for number in (AN_IMAGE, count):  # a small one first: what it imports belongs to the program
        run = stand_in_run(folder / str(number) / "data.jsonl", number)
        before = reset_peak()
        found = find(run)
        peak = resident_peak() - before
        assert found.ranking.num_samples == number
    sys.stdout.write(json.dumps({"peak": peak}))


def write_data(folder: Path, count: int) -> Path:
    """`data.jsonl` with a small image for every seven expressions."""
    folder.mkdir()
    with (folder / "data.jsonl").open("w") as file:
        for number in range(count):
            image = f"image_{number // AN_IMAGE:06}.png"
            if number % AN_IMAGE == 0:
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


def stand_in_run(data: Path, count: int) -> Any:
    """The finder's options, composed as the command composes them, around a model that costs nothing."""
    from localization_heads.options.compose import compose_options
    from localization_heads.stages.run import Run

    out = f"output_dir={data.parent / 'out'}"
    run = Run(compose_options("finder", f"data_file={data}", out, f"num_samples={count}", "batch_size=64"))
    run.__dict__["lvlm"] = StandIn()  # where the cached property would put it
    return run


def fill_store(run: Any, count: int) -> None:
    """What a run that was killed has left of the first `count` samples."""
    from localization_heads.stages.entries import load_entries
    from localization_heads.stages.statistics import open_statistics

    entries, store, random = load_entries(run), open_statistics(run), np.random.default_rng(1)
    for start in range(0, count, 1000):
        part = entries.samples[start : min(start + 1000, count)]
        sums, area, mass = (random.random((len(part), 32, 32), dtype=np.float32) for _ in range(3))
        store.append([entries.key(sample) for sample in part], sums, area, mass, sums > 0.9)


class StandIn:
    """As much of an `LVLM` as `find` asks for."""

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
        self.random = np.random.default_rng(0)

    def with_num_images(self, _: int) -> StandIn:
        return self

    def prompt(self, expression: str) -> str:
        return expression

    def can_prepare(self, _: object) -> bool:
        return True

    def attend_batch(self, images: Sequence[Image.Image], expressions: Sequence[str], **_: Any) -> list[Any]:
        maps = (self.random.random((32, 32, 3, 3), dtype=np.float32) for _ in images)
        return [AttentionMaps(one, image_box=(0, 0, 3, 3), image_size=(3, 3)) for one in maps]


if __name__ == "__main__":
    measure(Path(sys.argv[1]), int(sys.argv[2]))

"""(f) `find` with one, two and four ray workers, on the embedded model and the synthetic benchmark."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

from benchmarks.result import Row, seconds_text
from benchmarks.setting import Setting

KEY = "f"
ROOT = Path(__file__).parents[1]
TIMEOUT = 900  # seconds for one command
ONE_CORE = ("engine.cpus_per_worker=1", "engine.gpus_per_worker=0")


def rows(setting: Setting) -> list[Row]:
    what = "find: ray workers / engine=local"
    if not (files("localization_heads") / "config" / "engine" / "ray.yaml").is_file():
        return [Row(KEY, what, note="skipped: this version has no engine=ray")]
    if find_spec("ray") is None:
        return [Row(KEY, what, note="skipped: pip install 'localization-heads[ray]'")]
    count = 16 if setting.quick else 800
    with tempfile.TemporaryDirectory() as folder:
        data = ["data=scenes", f"scenes.count={count}", f"scenes.folder={folder}/scenes"]
        seconds_of("stage=scenes", *data)
        find = ["stage=find", *data, f"num_samples={count}", "num_threads=1", "device=cpu"]
        local_seconds = seconds_of(*find, "engine=local", f"output_dir={folder}/local")
        table = []
        for workers in (1, 2, 4)[: 1 if setting.quick else None]:
            if workers <= (os.cpu_count() or 1):
                options = [f"engine.num_workers={workers}", f"output_dir={folder}/{workers}"]
                seconds = seconds_of(*find, "engine=ray", *ONE_CORE, *options)
                table.append(row(count, workers, seconds, local_seconds))
    return table


def row(count: int, workers: int, seconds: float, local_seconds: float) -> Row:
    what = f"find of {count} scenes: {workers} ray workers / engine=local, start-up included"
    rates = f"{count / seconds:.1f} a second, locally {count / local_seconds:.1f}"
    return Row(KEY, what, seconds_text(seconds), seconds_text(local_seconds), seconds / local_seconds, note=rates)


def seconds_of(*options: str) -> float:
    """Wall time of a whole finder command, with one thread per process."""
    command = [sys.executable, str(ROOT / "localization_heads_finder.py"), *options]
    start = perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=TIMEOUT)
    return perf_counter() - start

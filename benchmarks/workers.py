"""(f) `find` over more and more workers, on the embedded model and its scenes."""

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
ONE_CORE = "engine.cpus_per_worker=1"


def rows(setting: Setting) -> list[Row]:
    what = "find: ray workers / engine=local"
    if not (files("localization_heads") / "config" / "engine" / "ray.yaml").is_file():
        return [Row(KEY, what, note="skipped: this version has no engine=ray")]
    if find_spec("ray") is None:
        return [Row(KEY, what, note="skipped: pip install 'localization-heads[ray]'")]
    count = 16 if setting.quick else 600
    alone = seconds_of_find(count, "engine=local")
    found = []
    for workers in (1, 2, 4)[: 1 if setting.quick else None]:
        if workers <= (os.cpu_count() or 1):
            spread = seconds_of_find(count, "engine=ray", f"engine.num_workers={workers}", ONE_CORE)
            rate = f"{count / spread:.0f} a second"
            name = f"find of {count} scenes: {workers} ray workers / engine=local, start-up included"
            found.append(Row(KEY, name, seconds_text(spread), seconds_text(alone), spread / alone, note=rate))
    return found


def seconds_of_find(count: int, *options: str) -> float:
    """A whole command, in a fresh folder, one thread a process."""
    with tempfile.TemporaryDirectory() as folder:
        scenes = ["data=scenes", f"scenes.count={count}", f"scenes.folder={folder}/scenes"]
        finder = [sys.executable, str(ROOT / "localization_heads_finder.py")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*finder, "stage=scenes", *scenes], check=True, env=environment, capture_output=True)
        start = perf_counter()
        subprocess.run(
            [*finder, "stage=find", *scenes, f"output_dir={folder}/out", *options],
            check=True,
            env=environment,
            capture_output=True,
        )
        return perf_counter() - start

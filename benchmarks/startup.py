"""(h) Start-up time of a command, measured on whole processes, against a limit of half a second."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.result import Row, limit_row, seconds_text
from benchmarks.setting import Setting

KEY = "h"
LIMIT = 0.5  # seconds
ROOT = Path(__file__).parents[1]
COMMANDS = {
    "--help": ["localization_heads_finder.py", "--help"],
    "import localization_heads": ["-c", "import localization_heads"],
}


def rows(setting: Setting) -> list[Row]:
    variants = {name: lambda c=command: run(c) for name, command in COMMANDS.items()}  # type: ignore[misc]
    timings = setting.time(variants)
    return [
        limit_row(KEY, f"{name}: whole process / limit", timings.median(name), LIMIT, seconds_text) for name in variants
    ]


def run(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)

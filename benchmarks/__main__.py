"""Run every benchmark and print one table of ratios: `python -m benchmarks`, or `--only a,d --rounds 3`."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console

from benchmarks import capture, discovery, early_exit, entropy, machine, published, sharing, startup, workers
from benchmarks.result import Row, failed_row, markdown_table, replace_table, rich_table
from benchmarks.setting import Setting
from benchmarks.timing import MIN_ROUNDS

BENCHMARKS: dict[str, ModuleType] = {
    module.KEY: module for module in (capture, published, sharing, early_exit, entropy, workers, discovery, startup)
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    keys = options.only.split(",") if options.only else list(BENCHMARKS)
    if unknown := [key for key in keys if key not in BENCHMARKS]:
        known = ", ".join(BENCHMARKS)
        sys.stderr.write(f"error: --only={options.only}: no benchmark {unknown[0]!r}; choose from {known}\n")
        return 2
    if options.page:  # fail before the work, not after it
        try:
            replace_table(Path(options.page), None)
        except (OSError, ValueError) as error:
            sys.stderr.write(f"error: --page={options.page}: {error}\n")
            return 2
    measured = machine.measure(quick=options.quick)
    setting = Setting(measured, options.rounds, options.layers, options.quick, options.seconds)
    rows: list[Row] = []
    caption = (
        f"{measured.describe()}; medians of {options.rounds} rounds at most, in which the ways take turns (a "
        f"comparison that has taken {options.seconds} s begins no other)"
    )
    failures = 0
    for key in keys:
        what = (BENCHMARKS[key].__doc__ or "").splitlines()[0]
        sys.stderr.write(f"{key}: {what}\n")
        try:
            rows += BENCHMARKS[key].rows(setting)
        except Exception as error:  # the other benchmarks still run
            traceback.print_exc()
            rows.append(failed_row(key, what, error))
            failures += 1
        _write(options, rows, caption)  # after each one: a later crash loses nothing
    if options.page:
        replace_table(Path(options.page), f"{markdown_table(rows)}\n\n{caption}")
    Console(width=None if sys.stdout.isatty() else 200).print(rich_table(rows, caption))
    return 1 if failures else 0


def _write(options: argparse.Namespace, rows: Sequence[Row], caption: str) -> None:
    if options.json:
        content = {"machine": caption, "rows": [row.to_json() for row in rows]}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        Path(options.markdown).write_text(f"{markdown_table(rows)}\n\n{caption}\n", encoding="utf-8")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = "; ".join(f"{key} {module.__name__.split('.')[-1]}" for key, module in BENCHMARKS.items())
    parser.add_argument("--only", metavar="a,c", help=f"run only these: {names}")
    parser.add_argument(
        "--layers",
        type=_positive,
        metavar="N",
        help="decoder layers in a, b, c (4; on a GPU 32)",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=5,
        metavar="N",
        help="how often each variant is timed, at most (5)",
    )
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=60,
        metavar="N",
        help=f"a comparison begins no further round after this time, once it has {MIN_ROUNDS} (60)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="also write the table as Markdown")
    parser.add_argument("--page", metavar="FILE", help="replace the table on this page, between its marks")
    parser.add_argument("--quick", action="store_true", help="toy sizes, as a smoke test")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("give a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())

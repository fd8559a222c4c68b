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
from benchmarks.result import Row, failed_row, markdown_of, put_into, table_of
from benchmarks.setting import Setting
from benchmarks.timing import FEWEST

BENCHMARKS: dict[str, ModuleType] = {
    module.KEY: module
    for module in (capture, published, sharing, early_exit, entropy, workers, discovery, startup)
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    keys = options.only.split(",") if options.only else list(BENCHMARKS)
    if unknown := [key for key in keys if key not in BENCHMARKS]:
        sys.stderr.write(
            f"error: --only={options.only}: there is no {unknown[0]!r}; {', '.join(BENCHMARKS)} are\n"
        )
        return 2
    if options.page:  # is there a place for it? Before the work, not after it
        try:
            put_into(Path(options.page), None)
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
        except Exception as error:  # the others are worth having
            traceback.print_exc()
            rows.append(failed_row(key, what, error))
            failures += 1
        _write(options, rows, caption)  # what was measured is not lost if a later one ends the process
    if options.page:
        put_into(Path(options.page), f"{markdown_of(rows)}\n\n{caption}")
    Console(width=None if sys.stdout.isatty() else 200).print(table_of(rows, caption))
    return 1 if failures else 0


def _write(options: argparse.Namespace, rows: Sequence[Row], caption: str) -> None:
    if options.json:
        content = {"machine": caption, "rows": [row.to_json() for row in rows]}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        Path(options.markdown).write_text(f"{markdown_of(rows)}\n\n{caption}\n", encoding="utf-8")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = "; ".join(f"{key} {module.__name__.split('.')[-1]}" for key, module in BENCHMARKS.items())
    parser.add_argument("--only", metavar="a,c", help=f"only these: {names}")
    parser.add_argument(
        "--layers",
        type=_positive,
        metavar="N",
        help="layers of the LM in a, b, c (4; on a GPU 32)",
    )
    parser.add_argument(
        "--rounds", type=_positive, default=5, metavar="N", help="how often each way is timed (5)"
    )
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=60,
        metavar="N",
        help=f"a comparison begins no further round after so many seconds, but for the first {FEWEST} (60)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there as well")
    parser.add_argument("--page", metavar="FILE", help="put the table into that page, between its two marks")
    parser.add_argument("--quick", action="store_true", help="toy sizes: see that everything runs")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("give a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())

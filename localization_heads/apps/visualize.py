"""`visualize_attention.py`: the maps, components and box of attention files that are already on disk."""

from __future__ import annotations

from typing import Any

from localization_heads.apps.frontdoor import plain_options
from localization_heads.apps.frontdoor import run as run_front_door


def main() -> int:
    """The exit status: 0 all went well, 1 some entry failed, 2 wrong use."""
    return run_front_door(_main, "visualize", "python visualize_attention.py")


def _main(cfg: Any) -> int:
    from localization_heads.apps import tables
    from localization_heads.errors import UsageError
    from localization_heads.options.programs import VisualizeOptions
    from localization_heads.stages.visualize import show_entries, show_file

    options = VisualizeOptions.of(plain_options(cfg))
    if options.mode == "batch":
        paths, failures = show_entries(options)
        tables.written(paths)
        if failures:
            tables.show(tables.failures_table(failures))
        return 1 if failures else 0
    if not options.attention_file:
        raise UsageError("attention_file= is missing: mode=single needs it")
    tables.written(show_file(options, str(options.attention_file), options.layer, options.head))
    return 0

"""The command `localization_heads_finder.py` (`locheads`, `python -m localization_heads`, `... .apps.finder`).

Slow imports are deferred until the options have been read, so that help and errors appear immediately.
"""

from __future__ import annotations

import atexit
import gc
import sys
from typing import TYPE_CHECKING

from localization_heads.apps.frontdoor import CommandLine, called_as, run
from localization_heads.errors import printable
from localization_heads.packages import check_versions

if TYPE_CHECKING:
    from localization_heads.stages.run import Run

_GC_THRESHOLDS = (50_000, 20, 100)
"""Garbage collection is made rarer, since it would scan the million objects of the imported libraries."""


def finder() -> int:
    """Run a stage. Returns the exit status: 0 success, 1 some entry or work failed, 2 wrong use."""
    return run(_finder, "finder", called_as())


def _finder(command_line: CommandLine) -> int:
    gc.set_threshold(*_GC_THRESHOLDS)
    check_versions()
    from localization_heads.apps.finder_stages import run_stage
    from localization_heads.stages.run import Run

    return run_stage(Run(*command_line, before_model=_announce))


def _announce(run: Run) -> None:
    """Print stage, model and input once the options are checked, before the slow import of the model's code."""
    from localization_heads.apps.tables import show

    options = run.options
    # resolve_images: the text of an image's address omits secrets.
    name = run.resolve_images(options.image_file) if options.image_file else options.video_file or options.data_file
    line = f"stage={run.options.stage}  {run.spec.name}  {name or ''}".rstrip()
    show(printable(line), markup=False, highlight=False)
    _import_model_code()


def _import_model_code() -> None:
    """Import torch and transformers, excluding their million permanent objects from garbage collection.

    They are frozen again at exit, where a collection would take a second.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import localization_heads.lvlm.checkpoints.loading  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()
    atexit.register(gc.freeze)


if __name__ == "__main__":
    sys.exit(finder())

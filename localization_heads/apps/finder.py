"""The command `localization_heads_finder.py` (`locheads`, `python -m localization_heads`, `... .apps.finder`).

What takes time to import waits until the options are read: help and errors are there at once.
"""

from __future__ import annotations

import atexit
import gc
import sys
from typing import TYPE_CHECKING

from localization_heads.apps.frontdoor import Given, called_as, run
from localization_heads.errors import printable
from localization_heads.packages import check_versions

if TYPE_CHECKING:
    from localization_heads.stages.run import Run

_RARELY = (50_000, 20, 100)
"""Allocations between two collections of garbage: the libraries' million objects are looked through less often."""


def finder() -> int:
    """One stage. The exit status: 0 all went well, 1 some entry or work failed, 2 wrong use."""
    return run(_finder, "finder", called_as())


def _finder(given: Given) -> int:
    gc.set_threshold(*_RARELY)
    check_versions()
    from localization_heads.apps.finder_stages import run_stage
    from localization_heads.stages.run import Run

    return run_stage(Run(*given, before_model=_announce))


def _announce(run: Run) -> None:
    """One line within a second of the command, once its options have been checked and before the model is loaded."""
    from localization_heads.apps.tables import show

    # An image's address may hold a secret, which its own text leaves out.
    options = run.options
    name = (
        run.resolve_images(options.image_file)
        if options.image_file
        else options.video_file or options.data_file
    )
    line = f"stage={run.options.stage}  {run.spec.name}  {name or ''}".rstrip()
    show(printable(line), markup=False, highlight=False)
    _import_model_code()


def _import_model_code() -> None:
    """Import torch and transformers without a search for garbage among their million objects, which all stay.

    Nor are they looked through later, of which the end of the process alone would be a second.
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

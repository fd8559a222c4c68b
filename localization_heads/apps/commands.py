"""The commands: `localization_heads_finder.py` (`locheads`), `visualize_attention.py` and `cli_llava.py`.

What takes time to import waits until the options are read: help and errors are there at once.
"""

from __future__ import annotations

import atexit
import gc
import sys
from typing import TYPE_CHECKING

from localization_heads.apps.frontdoor import Given, called_as, run
from localization_heads.errors import UsageError, printable
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
    name = run.shown(options.image_file) if options.image_file else options.video_file or options.data_file
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


def visualize() -> int:
    """Figures of attention files on disk. The exit status: 0 all went well, 1 some entry failed, 2 wrong use."""
    return run(_visualize, "visualize", called_as())


def _visualize(given: Given) -> int:
    from localization_heads.apps import tables
    from localization_heads.stages.visualize import show_entries, show_file

    options = given.options
    if options.mode == "batch":
        paths, failures = show_entries(options)
        tables.written(paths)
        return tables.show_failures(failures)
    if not options.attention_file:
        raise UsageError("attention_file= is missing: mode=single needs it")
    tables.written(show_file(options, options.attention_file, options.layer, options.head))
    return 0


def chat() -> int:
    """One answer, or a conversation. The exit status: 0 all went well, 1 the model failed, 2 wrong use."""
    return run(_chat, "chat", called_as())


def _chat(given: Given) -> int:
    check_versions()
    from localization_heads.apps.terminal import converse, print_answer, start
    from localization_heads.stages.run import ChatRun

    run = ChatRun(*given)
    if run.options.cli_mode:
        return converse(run)
    if not run.options.query:
        raise UsageError("query= is missing: ask something, or start a conversation with cli_mode=true")
    print_answer(start(run), run.options.query)
    return 0

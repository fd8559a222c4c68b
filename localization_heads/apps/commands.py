"""The commands `visualize_attention.py` and `cli_llava.py`.

What takes time to import waits until the options are read: help and errors are there at once.
"""

from __future__ import annotations

from localization_heads.apps.frontdoor import Given, called_as, run
from localization_heads.errors import UsageError
from localization_heads.packages import check_versions


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

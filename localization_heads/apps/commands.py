"""The commands `visualize_attention.py` and `cli_llava.py`.

Slow imports are deferred until the options have been read, so that help and errors appear immediately.
"""

from __future__ import annotations

from localization_heads.apps.frontdoor import CommandLine, called_as, run
from localization_heads.errors import UsageError
from localization_heads.packages import check_versions


def visualize() -> int:
    """Draw figures of attention files. Returns the exit status: 0 success, 1 some entry failed, 2 wrong use."""
    return run(_visualize, "visualize", called_as())


def _visualize(command_line: CommandLine) -> int:
    from localization_heads.apps import tables
    from localization_heads.stages.visualize import show_entries, show_file

    options = command_line.options
    if options.mode == "batch":
        paths, failures = show_entries(options)
        tables.show_paths(paths)
        return tables.show_failures(failures)
    if not options.attention_file:
        raise UsageError("attention_file= is missing: mode=single needs it")
    tables.show_paths(show_file(options, options.attention_file, options.layer, options.head))
    return 0


def chat() -> int:
    """Answer a question, or start a conversation. Returns the exit status: 0 success, 1 failure, 2 wrong use."""
    return run(_chat, "chat", called_as())


def _chat(command_line: CommandLine) -> int:
    check_versions()
    from localization_heads.apps.terminal import converse, print_answer, start
    from localization_heads.stages.run import ChatRun

    chat_run = ChatRun(*command_line)
    if chat_run.options.cli_mode:
        return converse(chat_run)
    if not chat_run.options.query:
        raise UsageError("query= is missing: ask something, or start a conversation with cli_mode=true")
    print_answer(start(chat_run), chat_run.options.query)
    return 0

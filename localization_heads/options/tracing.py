"""The options of `stage=trace`: maps of the words that the model writes."""

from __future__ import annotations

from typing import Literal

from localization_heads.options.kinds import Options, option, options

Keep = Literal["heads", "mean", "all"]
Step = Literal["writes", "reads"]
TRACE_TOKENS = 64
"""Tokens of an answer, at most, where none are named."""
MOST_TOKENS = 1024
"""Of a trace: longer ones no page could show."""


@options
class TraceOptions(Options):
    """Maps of the answer (stage=trace)."""

    step: Step = option(
        "writes",
        "Which attention belongs to a word: that of the step that writes it, whose outcome the word is (writes), or "
        "that of the step that reads it to write the next (reads, as query_token=answer_first and answer_mean).",
    )
    keep: Keep = option(
        "heads",
        "What is kept of each token of the answer: the map of each chosen head (heads), their mean alone (mean), or "
        "the maps of all heads as well, which may take gigabytes (all).",
    )

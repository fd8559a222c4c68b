"""The options of `stage=trace`: maps of the words that the model writes."""

from __future__ import annotations

from typing import Literal

from localization_heads.errors import UsageError
from localization_heads.options.kinds import Options, option, options, shown

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


def check_span(query_token: str, answer_span: str | None) -> None:
    """UsageError for a span without the query token that reads it, or the other way round."""
    if (query_token == "answer_span") != bool(answer_span and answer_span.strip()):
        raise UsageError(
            f"query_token={query_token} answer_span={shown(answer_span)}: query_token=answer_span needs "
            "answer_span=, a text of the answer or box, and nothing else reads it"
        )

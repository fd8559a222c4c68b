"""Several objects from one query: split it at semicolons, or take the noun phrases that spaCy finds in it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from localization_heads.errors import UsageError

if TYPE_CHECKING:
    from spacy.tokens import Doc, Span

_WHERE = "left right top bottom middle center centre side corner edge front back background foreground"
PLACES = frozenset([*_WHERE.split(), "picture", "image", "photo"])
"""Nouns that say where and not what: `the dog on the left` is one object."""


def split_phrases(query: str, by: str = "split", model: str = "en_core_web_sm") -> list[str]:
    """The phrases of a query, each once and in order; the query itself if it has none.

    Args:
        by: `"split"` (at each semicolon), `"spacy"` (noun phrases) or `"whole"`.
        model: the spaCy pipeline, a package or a folder.

    Raises:
        UsageError: spaCy or its pipeline is not installed, or the pipeline finds no noun phrases.
    """
    if by == "whole" or (by == "split" and ";" not in query):
        return [query]
    found = query.split(";") if by == "split" else noun_phrases(_parsed(query, model))
    return _once(found) or [query]


def noun_phrases(doc: Doc) -> list[str]:
    """The noun phrases of a parsed text, pronouns left out; a place goes with the phrase before it."""
    spans: list[tuple[int, int]] = []
    for chunk in doc.noun_chunks:
        if chunk.root.pos_ == "PRON":
            continue
        if spans and chunk.root.lower_ in PLACES and _only_prepositions(doc[spans[-1][1] : chunk.start]):
            spans[-1] = spans[-1][0], chunk.end
        else:
            spans.append((chunk.start, chunk.end))
    return [doc[start:end].text for start, end in spans]


def _only_prepositions(between: Span) -> bool:
    return len(between) > 0 and all(token.pos_ == "ADP" for token in between)


def _once(phrases: Iterable[str]) -> list[str]:
    """Without blanks around them, none empty, each once whatever its case."""
    kept = {
        " ".join(phrase.split()).casefold(): " ".join(phrase.split()) for phrase in reversed(list(phrases))
    }
    kept.pop("", None)
    return list(kept.values())[::-1]


def _parsed(text: str, model: str) -> Doc:
    doc: Doc = _pipeline(model)(text)
    if not doc.has_annotation("DEP"):
        raise UsageError(f"phrases.model={model}: it has no parser; phrases.model=en_core_web_sm has one")
    return doc


@cache
def _pipeline(model: str) -> Any:
    """The spaCy pipeline, loaded once."""
    try:
        import spacy
    except ImportError as error:
        raise UsageError(
            "phrases.by=spacy needs an extra: pip install 'localization-heads[phrases]' "
            "(phrases.by=split needs none: write the objects with ; between them)"
        ) from error
    try:
        return spacy.load(model)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(
            f"phrases.model={model}: there is no such pipeline here; python -m spacy download {model}"
        ) from error

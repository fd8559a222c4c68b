"""Split a query that names several objects into phrases: at semicolons, or into spaCy's noun phrases."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from localization_heads.errors import UsageError

if TYPE_CHECKING:
    from spacy.tokens import Doc, Span

_DIRECTIONS = "left right top bottom middle center centre side corner edge front back background foreground"
PLACE_NOUNS = frozenset([*_DIRECTIONS.split(), "picture", "image", "photo"])
"""Nouns that give a position, not an object: `the dog on the left` is one phrase."""


def split_phrases(query: str, by: str = "split", model: str = "en_core_web_sm") -> list[str]:
    """The phrases of a query, in order, without duplicates; the query itself if there are none.

    Args:
        by: `"split"` (at each semicolon), `"spacy"` (noun phrases) or `"whole"`.
        model: spaCy pipeline, as the name of a package or a folder.

    Raises:
        UsageError: spaCy or its pipeline is not installed, or the pipeline has no parser.
    """
    if by == "whole" or (by == "split" and ";" not in query):
        return [query]
    phrases = query.split(";") if by == "split" else noun_phrases(_parse(query, model))
    return _deduplicate(phrases) or [query]


def noun_phrases(doc: Doc) -> list[str]:
    """The noun phrases of a parsed text without pronouns; a position is joined to the phrase before it."""
    spans: list[tuple[int, int]] = []
    for chunk in doc.noun_chunks:
        if chunk.root.pos_ == "PRON":
            continue
        if spans and chunk.root.lower_ in PLACE_NOUNS and _only_prepositions(doc[spans[-1][1] : chunk.start]):
            spans[-1] = spans[-1][0], chunk.end
        else:
            spans.append((chunk.start, chunk.end))
    return [doc[start:end].text for start, end in spans]


def _only_prepositions(between: Span) -> bool:
    return len(between) > 0 and all(token.pos_ == "ADP" for token in between)


def _deduplicate(phrases: Iterable[str]) -> list[str]:
    """Normalise whitespace, and drop empty phrases and case-insensitive duplicates."""
    unique: dict[str, str] = {}
    for phrase in phrases:
        text = " ".join(phrase.split())
        if text:
            unique.setdefault(text.casefold(), text)
    return list(unique.values())


def _parse(text: str, model: str) -> Doc:
    doc: Doc = _load_pipeline(model)(text)
    if not doc.has_annotation("DEP"):
        raise UsageError(f"phrases.model={model}: it has no parser; phrases.model=en_core_web_sm has one")
    return doc


@cache
def _load_pipeline(model: str) -> Any:
    """Load a spaCy pipeline, once."""
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

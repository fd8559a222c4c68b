"""Words that a word-level tokenizer does not know, which the user is warned about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localization_heads.lvlm.model_with_processor import ModelWithProcessor

PUNCTUATION = ".,:;!?\"'()"
MAX_LISTED = 8
"""Unknown words that the warning lists."""


def unknown_words(tokenizer: Any, expressions: Sequence[str]) -> list[str]:
    """The distinct words that the tokenizer has no token for. Sub-word tokenizers know every word."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    words = dict.fromkeys(word for text in expressions for word in _split_expression(text))
    return [word for word in words if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]


def _split_expression(expression: str) -> list[str]:
    """
    >>> _split_expression("the dog, (a brown one)?")
    ['the', 'dog', 'a', 'brown', 'one']
    """
    return [word for part in expression.split() if (word := part.strip(PUNCTUATION))]


def singularize_unknown_words(tokenizer: Any, expression: str) -> str:
    """The expression with each unknown word in the singular, if the tokenizer knows that.

    >>> known = {"the": 1, "dog": 2, "butterfly": 3}
    >>> class Coder:
    ...     unk_token_id = 0
    ...     def __call__(self, word, add_special_tokens):
    ...         return {"input_ids": [known.get(word, 0)]}
    >>> singularize_unknown_words(Coder(), "the dogs, butterflies"), singularize_unknown_words(Coder(), "the cats")
    ('the dog, butterfly', 'the cats')
    """
    for word in unknown_words(tokenizer, [expression]):
        known = next((form for form in singulars(word) if not unknown_words(tokenizer, [form])), None)
        if known:
            expression = re.sub(rf"\b{re.escape(word)}\b", known, expression)
    return expression


def singulars(word: str) -> list[str]:
    """Possible singulars of a word, the likeliest first; empty if it is no plural.

    >>> singulars("butterflies"), singulars("boxes"), singulars("glass")
    (['butterfly', 'butterflie', 'butterfli'], ['boxe', 'box'], [])
    """
    endings = {"ies": "y", "ves": "f", "s": "", "es": "", "i": "us"}
    if word.endswith("ss"):
        return []
    return [word.removesuffix(plural) + singular for plural, singular in endings.items() if word.endswith(plural)]


def warn_of_unknown_words(lvlm: ModelWithProcessor, expressions: Sequence[str]) -> None:
    """Warn once about all unknown words, and say in how many expressions they occur."""
    tokenizer = lvlm.processor.tokenizer
    if not (unknown := unknown_words(tokenizer, expressions)):
        return
    listed = ", ".join(unknown[:MAX_LISTED])
    more = f" and {len(unknown) - MAX_LISTED} more" if len(unknown) > MAX_LISTED else ""
    affected = sum(not set(unknown).isdisjoint(_split_expression(text)) for text in expressions)
    share = f", in {affected} of {len(expressions)} expressions" if len(expressions) > 1 else ""
    lvlm.note(f"{listed}{more}: not among the {len(tokenizer)} words of the {lvlm.name} model{share}")

"""Words that a model does not know: what they name cannot be found, and is named in a note."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localization_heads.lvlm.prompted import PromptedModel

PUNCTUATION = ".,:;!?\"'()"
MOST_NAMED = 8
"""Unknown words that a note names."""


def unknown_words(tokenizer: Any, expressions: Sequence[str]) -> list[str]:
    """Words that the model's tokenizer has no token for, each once: what they name cannot be found.

    Args:
        tokenizer: of a Hugging Face model. One that spells every word (SentencePiece, byte pairs) knows them all.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    words = dict.fromkeys(word for text in expressions for word in words_of(text))
    return [word for word in words if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]


def words_of(expression: str) -> list[str]:
    """
    >>> words_of("the dog, (a brown one)?")
    ['the', 'dog', 'a', 'brown', 'one']
    """
    return [word for part in expression.split() if (word := part.strip(PUNCTUATION))]


def singularize_unknown_words(tokenizer: Any, expression: str) -> str:
    """The expression, each word that the model does not know in the singular, if it knows that.

    >>> known = {"the": 1, "dog": 2, "butterfly": 3}
    >>> class Coder:
    ...     unk_token_id = 0
    ...     def __call__(self, word, add_special_tokens):
    ...         return {"input_ids": [known.get(word, 0)]}
    >>> singularize_unknown_words(Coder(), "the dogs, butterflies"), singularize_unknown_words(Coder(), "the cats")
    ('the dog, butterfly', 'the cats')
    """
    for word in unknown_words(tokenizer, [expression]):
        known = [one for one in singulars(word) if not unknown_words(tokenizer, [one])]
        if known:
            expression = re.sub(rf"\b{re.escape(word)}\b", known[0], expression)
    return expression


def singulars(word: str) -> list[str]:
    """What a word may be the plural of, the likeliest first; none for one that is no plural.

    >>> singulars("butterflies"), singulars("boxes"), singulars("glass")
    (['butterfly', 'butterflie', 'butterfli'], ['boxe', 'box'], [])
    """
    endings = {"ies": "y", "ves": "f", "s": "", "es": "", "i": "us"}
    if word.endswith("ss"):
        return []
    return [word.removesuffix(plural) + one for plural, one in endings.items() if word.endswith(plural)]


def warn_of_unknown_words(lvlm: PromptedModel, expressions: Sequence[str]) -> None:
    """One note that names the words of all these expressions that the model does not know, and how many have any."""
    tokenizer = lvlm.processor.tokenizer
    if not (unknown := unknown_words(tokenizer, expressions)):
        return
    named = ", ".join(unknown[:MOST_NAMED])
    more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
    with_one = sum(not set(unknown).isdisjoint(words_of(text)) for text in expressions)
    share = f", in {with_one} of {len(expressions)} expressions" if len(expressions) > 1 else ""
    lvlm.note(f"{named}{more}: not among the {len(tokenizer)} words of the {lvlm.name} model{share}")

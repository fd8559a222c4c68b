"""What is asked about an image beside the expression: what else it shows, and how sure the model is.

Other expressions of the image are contrasted with this one (`grounding.contrast`); the model's own answers tell whether
the thing is there at all. All of it goes on from the image's encoding, where the family allows it, and uses the same
prompt as the expression itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from localization_heads.attention import AttentionMaps
from localization_heads.errors import UsageError
from localization_heads.heads.sensitivity import comparison_expressions
from localization_heads.lvlm.answers.answering import Said, Sides, spellings
from localization_heads.lvlm.extra_prompts import MAX_SIBLINGS, ExtraPrompts, other_expressions
from localization_heads.lvlm.sharing import EncodedImage, Question
from localization_heads.lvlm.text.prompts import ARTICLES, strip_closing_marks

BACKGROUND = "thing"
"""What `contrast=background` asks about: a word that names nothing in particular. A question about the whole image
("what is in this image?") measured worse on the embedded model, as its map is that of the most striking object."""
LISTING = "what is in this image?"
LISTING_TOKENS = 24
PRESENCE, STATEMENT = "is there {}?", "is {}?"
"""Questions about an expression that measured best on the embedded model: whether the thing is there, and whether the
expression holds, which tells false colours, places and relations ("is the dog on the left?")."""
LONGEST_NAME = 3  # words
AT_ONCE = 8
"""Questions about one image that go through the model together, beside its expressions."""


def attend_with_extras(
    image: EncodedImage,
    expressions: Sequence[str],
    siblings: Sequence[Sequence[str]] | None,
    extra_prompts: ExtraPrompts,
    last_layer: int | None,
) -> list[AttentionMaps]:
    """The maps of expressions of one image, with what is asked beside them.

    Args:
        siblings: for each expression the others of its image, of which the first `MAX_SIBLINGS` are taken; where there
            are none, the model lists what it sees.
    """
    given = siblings or [()] * len(expressions)
    if extra_prompts.signals or (
        extra_prompts.contrast == "siblings" and not extra_prompts.comparison_words and not all(given)
    ):
        image.encode()  # the model will speak, which takes all layers: not encoded twice
    found = image.attend(expressions, last_layer=last_layer)
    if extra_prompts.signals:
        found = _with_signals(image, found)
    wanted: Sequence[tuple[str, ...]]
    if extra_prompts.contrast == "background":
        wanted = [(BACKGROUND,)] * len(found)
    elif extra_prompts.contrast == "siblings" and extra_prompts.comparison_words:
        wanted = _comparison_expressions(found, given, extra_prompts.comparison_words)
    elif extra_prompts.contrast == "siblings":
        wanted = _siblings(image, found, given)
    elif extra_prompts.signals:
        wanted = _siblings(image, found, [()] * len(found))
    else:
        return found
    others = _others(image, wanted, extra_prompts, last_layer)
    return [
        # Of several images, those of the same one: others may draw more attention to another.
        replace(maps, others=tuple(others[text].at(maps.image_index) for text in texts if text in others))
        for maps, texts in zip(found, wanted, strict=True)
    ]


def _comparison_expressions(
    found: Sequence[AttentionMaps], given: Sequence[Sequence[str]], words: Sequence[str]
) -> list[tuple[str, ...]]:
    """The expressions whose maps each expression's are compared with, for the sensitivity."""
    return [
        comparison_expressions(maps.query, other_expressions(maps.query, others), words)
        for maps, others in zip(found, given, strict=True)
    ]


def _others(
    image: EncodedImage, wanted: Sequence[Sequence[str]], extra_prompts: ExtraPrompts, last_layer: int | None
) -> Mapping[str, AttentionMaps]:
    """The maps of each text, asked as it stands, a few at a time."""
    texts = list(dict.fromkeys(text for texts in wanted for text in texts))
    questions = _askable(image, texts)
    found: dict[str, AttentionMaps] = {}
    for start in range(0, len(questions), AT_ONCE):
        maps = image.answer(questions[start : start + AT_ONCE], last_layer)
        found |= {one.query: one.only(extra_prompts.heads) for one in maps}
    return found


def _askable(image: EncodedImage, texts: Sequence[str]) -> list[Question]:
    """The texts that can be asked: an entry that is wrong fails for itself, and not those that it is asked beside."""
    questions = []
    for text in texts:
        with suppress(UsageError):
            questions.append(image.question(text))
    return questions


def _with_signals(image: EncodedImage, found: Sequence[AttentionMaps]) -> list[AttentionMaps]:
    texts = [maps.query for maps in found]
    weighed = [one for part in _parts(texts) for one in image.weigh(part)]
    found = [
        replace(
            maps,
            answer_logprob=one.first_token if maps.answer_logprob is None else maps.answer_logprob,
            expression_logprob=one.expression,
        )
        for maps, one in zip(found, weighed, strict=True)
    ]
    if (sides := presence_sides(image.lvlm.processor.tokenizer)) is None:
        return found
    there, holds = ([_question(asked, text) for text in texts] for asked in (PRESENCE, STATEMENT))
    askable = [question.expression for question in _askable(image, [*there, *holds])]
    odds = {text: one.odds for text, one in zip(askable, _said(image, askable, 0, sides), strict=True)}
    return [
        replace(maps, presence_logit=odds.get(first), statement_logit=odds.get(second))
        for maps, first, second in zip(found, there, holds, strict=True)
    ]


def _question(template: str, expression: str) -> str:
    """
    >>> _question("is there {}?", "the dog.")
    'is there the dog?'
    """
    return template.replace("{}", strip_closing_marks(expression))


def presence_sides(tokenizer: Any) -> Sides | None:
    """The tokens for yes and for no; None where the tokenizer has no single one for either."""
    yes, no = spellings(tokenizer, "yes"), spellings(tokenizer, "no")
    return Sides(yes, no) if yes and no else None


def _said(
    image: EncodedImage, texts: Sequence[str], num_tokens: int, sides: Sides | None = None
) -> list[Said]:
    """What the model says to each text, asked a few at a time."""
    return [one for part in _parts(texts) for one in image.say(part, num_tokens, sides)]


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE))


def _siblings(
    image: EncodedImage, found: Sequence[AttentionMaps], siblings: Sequence[Sequence[str]]
) -> list[tuple[str, ...]]:
    """The other expressions of each, given or listed by the model."""
    wanted = [other_expressions(maps.query, others) for maps, others in zip(found, siblings, strict=True)]
    alone = [maps for maps, others in zip(found, wanted, strict=True) if not others]
    unheard = [maps.query for maps in alone if not maps.answer_text]
    said = _said(image, unheard, image.lvlm.answer_tokens)
    answers = {maps.query: maps.answer_text for maps in alone}
    answers |= {text: one.text for text, one in zip(unheard, said, strict=True)}
    listed = image.say([LISTING], LISTING_TOKENS)[0].text if alone else ""
    return [
        others or listed_expressions(listed, f"{maps.query} {answers[maps.query]}")
        for maps, others in zip(found, wanted, strict=True)
    ]


def listed_expressions(answer: str, own: str) -> tuple[str, ...]:
    """Expressions of what a model lists, without those whose last word occurs in `own`, at most `MAX_SIBLINGS`.

    A part of the answer, between commas, full stops and the word "and", names what follows its last article; longer
    ones than `LONGEST_NAME` words are no names.

    >>> listed_expressions("The image shows an owl, two frogs and a red car.", "the frog on the left")
    ('the owl', 'the red car')
    """
    known = {_singular(word) for word in re.findall(r"\w+", own.lower())}
    names: dict[str, None] = {}
    for part in re.split(r"[,;.:\n]|\band\b", answer.lower()):
        words = re.findall(r"[\w'-]+", part)
        last = max((place for place, word in enumerate(words) if word in ARTICLES), default=-1)
        name = words[last + 1 :]
        if 0 < len(name) <= LONGEST_NAME and _singular(name[-1]) not in known:
            names[f"the {' '.join(name)}"] = None
    return tuple(names)[:MAX_SIBLINGS]


def _singular(word: str) -> str:
    """Near enough to compare two words.

    >>> _singular("dogs"), _singular("glass")
    ('dog', 'glass')
    """
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word

"""Runs the extra prompts of an image (`ExtraPrompts`) and adds their results to the maps of its expressions.

Other expressions' maps go into `AttentionMaps.others`, the confidence signals into its log-probabilities. All prompts
share the image's KV cache if the family allows it, and use the same template as the expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from localization_heads.attention import AttentionMaps
from localization_heads.errors import UsageError
from localization_heads.heads.sensitivity import comparison_expressions
from localization_heads.lvlm.answers.answering import GeneratedAnswer, YesNoTokens, word_token_ids
from localization_heads.lvlm.extra_prompts import MAX_SIBLINGS, ExtraPrompts, other_expressions
from localization_heads.lvlm.sharing import EncodedImage, PreparedPrompt
from localization_heads.lvlm.text.prompts import ARTICLES, strip_closing_marks

BACKGROUND = "thing"
"""The prompt of `contrast=background`: a generic word. A question about the whole image ("what is in this image?") did
worse on the embedded model, as its map is that of the most salient object."""
LISTING = "what is in this image?"
LISTING_TOKENS = 24
PRESENCE, STATEMENT = "is there {}?", "is {}?"
"""Yes-no questions that did best on the embedded model: the first about presence, the second about the whole
expression, which detects false colours, places and relations ("is the dog on the left?")."""
MAX_NAME_WORDS = 3
BATCH_SIZE = 8
"""Extra prompts of one image that go through the model together."""


def attend_with_extras(
    image: EncodedImage,
    expressions: Sequence[str],
    siblings: Sequence[Sequence[str]],
    extra_prompts: ExtraPrompts,
    last_layer: int | None,
) -> list[AttentionMaps]:
    """The maps of expressions of one image, with the results of the extra prompts.

    Args:
        siblings: for each expression, the others of its image, of which the first `MAX_SIBLINGS` are used; if there are
            none, the model lists what it sees.
    """
    contrasts_siblings = extra_prompts.contrast == "siblings"
    if extra_prompts.signals or (contrasts_siblings and not extra_prompts.comparison_words and not all(siblings)):
        image.encode()  # the model will generate, which takes all layers: avoid encoding twice
    maps = image.attend(expressions, last_layer=last_layer)
    if extra_prompts.signals:
        maps = _with_signals(image, maps)
    others: Sequence[tuple[str, ...]]
    if extra_prompts.contrast == "background":
        others = [(BACKGROUND,)] * len(maps)
    elif contrasts_siblings and extra_prompts.comparison_words:
        others = [
            comparison_expressions(one.query, other_expressions(one.query, own), extra_prompts.comparison_words)
            for one, own in zip(maps, siblings, strict=True)
        ]
    elif contrasts_siblings:
        others = _siblings_or_listed(image, maps, siblings)
    elif extra_prompts.signals:
        others = _siblings_or_listed(image, maps, [()] * len(maps))
    else:
        return maps
    maps_by_text = _attend_others(image, others, extra_prompts, last_layer)
    return [
        # With several images in the prompt, contrast within the same one: others may draw attention elsewhere.
        replace(
            one,
            others=tuple(maps_by_text[text].at(one.image_index) for text in texts if text in maps_by_text),
        )
        for one, texts in zip(maps, others, strict=True)
    ]


def _attend_others(
    image: EncodedImage,
    others: Sequence[Sequence[str]],
    extra_prompts: ExtraPrompts,
    last_layer: int | None,
) -> Mapping[str, AttentionMaps]:
    """The maps of each distinct text, asked without paraphrases. Unusable texts are left out."""
    prompts = _prepare_usable(image, list(dict.fromkeys(text for texts in others for text in texts)))
    found: dict[str, AttentionMaps] = {}
    for batch in _batches(prompts):
        maps = image.attend_prepared(batch, last_layer)
        found |= {one.query: one.only(extra_prompts.heads) for one in maps}
    return found


def _prepare_usable(image: EncodedImage, texts: Sequence[str]) -> list[PreparedPrompt]:
    """Prompts of the usable texts. A bad expression must fail its own entry, not those that are contrasted with it."""
    prompts = []
    for text in texts:
        with suppress(UsageError):
            prompts.append(image.prepare(text))
    return prompts


def _with_signals(image: EncodedImage, maps: Sequence[AttentionMaps]) -> list[AttentionMaps]:
    """The maps with the confidence signals: log-probabilities, and the answers to the two yes-no questions."""
    texts = [one.query for one in maps]
    logprobs = [one for batch in _batches(texts) for one in image.logprobs(batch)]
    maps = [
        replace(
            one,
            answer_logprob=own.next_token if one.answer_logprob is None else one.answer_logprob,
            expression_logprob=own.expression,
        )
        for one, own in zip(maps, logprobs, strict=True)
    ]
    if (yes_no := yes_no_tokens(image.lvlm.processor.tokenizer)) is None:
        return maps
    presence, statement = ([_question(template, text) for text in texts] for template in (PRESENCE, STATEMENT))
    usable = [prompt.expression for prompt in _prepare_usable(image, [*presence, *statement])]
    answers = _generate(image, usable, 0, yes_no)
    logits = {text: answer.yes_logit for text, answer in zip(usable, answers, strict=True)}
    return [
        replace(one, presence_logit=logits.get(first), statement_logit=logits.get(second))
        for one, first, second in zip(maps, presence, statement, strict=True)
    ]


def _question(template: str, expression: str) -> str:
    """
    >>> _question("is there {}?", "the dog.")
    'is there the dog?'
    """
    return template.replace("{}", strip_closing_marks(expression))


def yes_no_tokens(tokenizer: Any) -> YesNoTokens | None:
    """The tokens for yes and for no; None if the tokenizer has no single token for either."""
    yes, no = word_token_ids(tokenizer, "yes"), word_token_ids(tokenizer, "no")
    return YesNoTokens(yes, no) if yes and no else None


def _siblings_or_listed(
    image: EncodedImage, maps: Sequence[AttentionMaps], siblings: Sequence[Sequence[str]]
) -> list[tuple[str, ...]]:
    """The other expressions of each; for those without any, the objects that the model lists."""
    others = [other_expressions(one.query, own) for one, own in zip(maps, siblings, strict=True)]
    lacking = [one for one, own in zip(maps, others, strict=True) if not own]
    if not lacking:
        return others
    answers = {one.query: one.answer_text for one in lacking}
    unanswered = [one.query for one in lacking if not one.answer_text]
    generated = _generate(image, unanswered, image.lvlm.answer_tokens)
    answers |= {text: answer.text for text, answer in zip(unanswered, generated, strict=True)}
    listed = image.generate([LISTING], LISTING_TOKENS)[0].text
    return [
        own or listed_expressions(listed, f"{one.query} {answers[one.query]}")
        for one, own in zip(maps, others, strict=True)
    ]


def listed_expressions(answer: str, own: str) -> tuple[str, ...]:
    """Expressions for the objects that an answer lists, at most `MAX_SIBLINGS`, without those whose noun is in `own`.

    The answer is split at punctuation and "and". In each part, the words after the last article are taken as a name,
    and the last of them as its noun; more than `MAX_NAME_WORDS` words are no name.

    >>> listed_expressions("The image shows an owl, two frogs and a red car.", "the frog on the left")
    ('the owl', 'the red car')
    """
    known = {_singular(word) for word in re.findall(r"\w+", own.lower())}
    names: dict[str, None] = {}
    for part in re.split(r"[,;.:\n]|\band\b", answer.lower()):
        words = re.findall(r"[\w'-]+", part)
        last_article = max((index for index, word in enumerate(words) if word in ARTICLES), default=-1)
        name = words[last_article + 1 :]
        if 0 < len(name) <= MAX_NAME_WORDS and _singular(name[-1]) not in known:
            names[f"the {' '.join(name)}"] = None
    return tuple(names)[:MAX_SIBLINGS]


def _singular(word: str) -> str:
    """A rough singular, good enough to compare two words.

    >>> _singular("dogs"), _singular("glass")
    ('dog', 'glass')
    """
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _generate(
    image: EncodedImage, texts: Sequence[str], max_tokens: int, yes_no: YesNoTokens | None = None
) -> list[GeneratedAnswer]:
    """`EncodedImage.generate` in batches."""
    return [answer for batch in _batches(texts) for answer in image.generate(batch, max_tokens, yes_no)]


T = TypeVar("T")


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE))

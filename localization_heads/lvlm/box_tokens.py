"""The attention of the tokens that spell a box, which the model writes itself (heads_by=vrh; arXiv 2608.27417).

The model is asked in its native box prompt and answers greedily. Which of its tokens spell the four numbers is known
only when all of it is there, so it is generated a second time, up to the last of them, and their rows are captured on
the way: memory holds one row a head, however long the answer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from localization_heads.attention import AttentionMaps
from localization_heads.errors import UsageError
from localization_heads.lvlm.answering import Hearing, generate
from localization_heads.lvlm.capture import Query
from localization_heads.lvlm.failures import memory_errors
from localization_heads.lvlm.geometry import read_maps
from localization_heads.lvlm.native_box import BoxFormat, box_prompt
from localization_heads.lvlm.query_tokens import query_of

if TYPE_CHECKING:
    from PIL import Image

    from localization_heads.lvlm.model import LVLM


class _Listed(Hearing):
    """Hears one answer, of whose tokens only those at the given places count (all, unless they are given)."""

    def __init__(self, ends: Sequence[int], wanted: Collection[int] | None = None) -> None:
        super().__init__(ends)
        self.ids: list[int] = []
        self._wanted = wanted

    def __call__(self, ids: Any, scores: torch.Tensor) -> torch.Tensor:
        place = len(self.ids)
        self.ids.append(int(scores.argmax(-1)[0]))
        found = super().__call__(ids, scores)
        if self.recorder is not None and self._wanted is not None and self.live is not None:
            self.recorder.live = self.live & (place in self._wanted)
        return found


def attend_box_tokens(lvlm: LVLM, form: BoxFormat, image: Image.Image, expression: str) -> AttentionMaps:
    """The mean attention over the tokens that spell the numbers of the model's own box, for every head.

    Each token's row is that of the step that reads it, so a box of the end of an answer costs one token more.

    Raises:
        UsageError: its answer holds no box.
        WorkError: out of memory.
    """
    seen = lvlm.seen(image)
    prompt = box_prompt(lvlm, form, expression)
    inputs = lvlm.encode([seen], [prompt])
    ends, tokenizer = lvlm.hearing().ends.tolist(), lvlm.processor.tokenizer
    heard = _Listed(ends)
    with memory_errors(), torch.inference_mode():
        generate(lvlm.model, inputs, form.max_new_tokens, heard, tokenizer.pad_token_id)
    places = number_tokens(tokenizer, heard.ids, form)
    if not places:
        said = " ".join(tokenizer.decode(heard.ids, skip_special_tokens=True).split())[:60]
        raise UsageError(f"the model writes no box; it answers '{said}'")
    again = _Listed(ends, frozenset(places))
    lvlm.query_rows(inputs, _query(lvlm, inputs, places[-1] + 1), None, again)
    row = again.rows[0]
    assert row is not None
    maps, box = read_maps(row.numpy(), lvlm.views_in(inputs, 0, seen), seen.size, lvlm.view)
    found = AttentionMaps(maps, box, seen.size, query=expression, prompt=prompt, model=lvlm.name)
    return replace(found, answer_text=tokenizer.decode(heard.ids).strip()).of_size(image.size)


def _query(lvlm: LVLM, inputs: Any, num_tokens: int) -> Query:
    if lvlm.model.config.is_encoder_decoder:
        return Query(answers=num_tokens)
    return query_of("last", [], inputs, lvlm.processor.tokenizer)._replace(answers=num_tokens)


def number_tokens(tokenizer: Any, ids: Sequence[int], form: BoxFormat) -> list[int]:
    """The places of the tokens that spell the four numbers of the first box in an answer; none if there is no box.

    Found by decoding the answer's beginnings, as tokens need not end where numbers do: a token counts if any of its
    letters belongs to a number.
    """
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    match = re.search(form.pattern, whole)
    if match is None:
        return []
    spans = [match.span(group) for group in range(1, 5)]
    places, start = [], 0
    for place in range(len(ids)):
        end = len(tokenizer.decode(ids[: place + 1], skip_special_tokens=False))
        if any(low < end and start < high for low, high in spans):
            places.append(place)
        start = max(start, end)
        if start >= spans[-1][1]:
            break
    return places

"""`query_token` in every kind of family, against the weights that eager attention modules return."""

from __future__ import annotations

import copy
from typing import Any

import family_models_tiled  # noqa: F401 -- more of tiny's families
import pytest
from family_models import tiny

from localization_heads.lvlm.doctor import compare
from localization_heads.lvlm.query_tokens import QUERY_TOKENS


@pytest.mark.parametrize(
    "name", ["qwen2_vl", "internvl", "idefics3", "paligemma", "gemma3", "mllama", "llava_next"]
)
@pytest.mark.parametrize("query_token", QUERY_TOKENS)
def test_families(image: Any, name: str, query_token: str) -> None:
    """Against eager, in a batch of different sizes: marks, tiles, bidirectional prefixes, cross-attention."""
    lvlm = copy.copy(tiny(name))
    lvlm.query_token = query_token
    images = [image, image.resize((200, 300))]
    prompts = [
        lvlm.located_prompt(expression) for expression in ("the dog", "the left red car in this image")
    ]
    inputs = lvlm.encode(images, [prompt.text for prompt in prompts])
    query = lvlm.query(prompts, inputs)
    assert compare(lvlm, inputs, query).difference < 1e-5
    if query.positions is not None:
        for ids, places, prompt in zip(inputs["input_ids"], query.positions.tolist(), prompts, strict=True):
            words = lvlm.processor.tokenizer.decode(ids[places[0] : max(places) + 1]).split()
            expected = prompt.expression.split()
            assert words == (expected if query_token == "expression_mean" else expected[-1:])

"""`query_token=answer_mean` and `last_and_answer`: the answer's rows equal those of eager attention, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from decoding import decode_without_cache, endless_lvlm, maps_of_row, variant
from family_models import tiny
from PIL import Image
from test_query_token import tiny_lvlm
from torch import Tensor

from localization_heads.attention import AttentionMaps
from localization_heads.errors import UsageError
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checks.footprints import coordinate_image
from localization_heads.lvlm.forward.capture import Query, Recorder
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.sharing import prepare_unshared

SAME = {"rtol": 0, "atol": 1e-5}
EXPRESSIONS = ["the red car", "the dog left in this image", "car"]
FAMILIES = ["qwen2_vl", "internvl", "idefics3", "paligemma", "gemma3", "mllama", "llava_next", "florence2"]
FAMILIES += ["gemma4"]


def assert_answer(lvlm: LVLM, image: Image.Image, maps: AttentionMaps, expected: Tensor | None) -> None:
    assert (maps.answer is None) == (expected is None)
    if expected is not None:
        own = maps_of_row(lvlm, image, maps.query, expected)
        np.testing.assert_allclose(maps.answer, own, **SAME)


@pytest.fixture
def end_at() -> Iterator[Any]:
    """Makes a model end its answers at given tokens; afterwards it ends them as before."""
    changed: list[tuple[Any, Any]] = []

    def end(model: Any, tokens: tuple[int, ...]) -> None:
        changed.append((model.generation_config, model.generation_config.eos_token_id))
        model.generation_config.eos_token_id = list(tokens)

    yield end
    for config, tokens in reversed(changed):
        config.eos_token_id = tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_equal_eager_attention_without_a_cache(name: str, end_at: Any) -> None:
    """In a batch in which one answer ends at once, one in the middle, and one not at all; and one by one."""
    lvlm, image = (
        variant(tiny(name), query_token="last_and_answer", answer_tokens=4),
        coordinate_image(190, 110),
    )
    seen = lvlm.image_for_processor(image)
    _, second, third = (decode_without_cache(lvlm, seen, text, 4).tokens for text in EXPRESSIONS)
    eos = second[2], third[0]
    end_at(lvlm.model, eos)
    together = prepare_unshared(lvlm, [image] * 3, EXPRESSIONS)(None)
    shared = lvlm.encode_image(image).attend(EXPRESSIONS)
    for text, batched, other in zip(EXPRESSIONS, together, shared, strict=True):
        expected = decode_without_cache(lvlm, seen, text, 4, eos)
        for maps in (lvlm.attend(image, text), batched, other):
            own = maps_of_row(lvlm, seen, text, expected.rows[0])
            np.testing.assert_allclose(maps.attention, own, **SAME)
            assert maps.answer_logprob == pytest.approx(expected.first_logprob, abs=1e-4)
            assert_answer(lvlm, seen, maps, expected.answer_row)


GEMMA2 = {"head_dim": 8, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 2.0, "attention": "eager"}


@pytest.mark.parametrize("options", [{"text": "mistral"}, {"text": "gemma2", **GEMMA2}])
def test_rows_equal_eager_attention_with_a_sliding_window(image: Image.Image, options: dict[str, Any]) -> None:
    """The window is shorter than the prompt, and moves on with the answer."""
    lvlm = endless_lvlm("last_and_answer", sliding_window=24, **options)
    for text in EXPRESSIONS:
        expected = decode_without_cache(lvlm, image, text, 8)
        for maps in (lvlm.attend(image, text), *lvlm.encode_image(image).attend([text])):
            assert_answer(lvlm, image, maps, expected.answer_row)


def test_rows_of_the_embedded_model_equal_eager_attention() -> None:
    lvlm, image = load_model("tiny", query_token="last_and_answer"), coordinate_image(192, 144)
    texts = ["the dog", "the red owl on the left", "a cat"]
    seen, eos = lvlm.image_for_processor(image), (lvlm.model.generation_config.eos_token_id,)
    for text, batched in zip(texts, lvlm.attend_batch([image.copy() for _ in texts], texts), strict=True):
        expected = decode_without_cache(lvlm, seen, text, 8, eos)
        words = lvlm.processor.tokenizer.decode(expected.tokens, skip_special_tokens=True)
        for maps in (batched, *lvlm.ask(image, [text])):
            assert maps.answer_text == " ".join(words.split())
            assert_answer(lvlm, seen, maps, expected.answer_row)


def test_answer_mean_is_the_answer_of_last_and_answer(image: Image.Image) -> None:
    """And the last prompt token's map for an empty answer."""
    both, mean, last = (tiny_lvlm(kind) for kind in ("last_and_answer", "answer_mean", "last"))
    two, one, plain = (lvlm.attend(image, "the dog") for lvlm in (both, mean, last))
    np.testing.assert_array_equal(one.attention, two.answer)
    np.testing.assert_allclose(two.attention, plain.attention, **SAME)
    assert one.answer is None
    assert abs(one.attention - plain.attention).max() > 1e-4
    mean.model.generation_config.eos_token_id = decode_without_cache(mean, image, "the dog", 1).tokens
    silent = mean.attend(image, "the dog")
    np.testing.assert_allclose(silent.attention, plain.attention, **SAME)
    assert (silent.answer, silent.answer_text) == (None, "")


def test_answer_tokens_limits_the_tokens_that_are_read(image: Image.Image) -> None:
    lvlm = endless_lvlm("last_and_answer")
    one, three = (variant(lvlm, answer_tokens=n).attend(image, "the dog").answer for n in (1, 3))
    first = endless_lvlm("answer_first").attend(image, "the dog").attention
    np.testing.assert_allclose(one, first, **SAME)
    assert abs(three - one).max() > 1e-5


def test_early_exit_keeps_the_lower_layers(image: Image.Image) -> None:
    lvlm = tiny_lvlm("last_and_answer")
    early, full = lvlm.attend(image, "the dog", last_layer=1), lvlm.attend(image, "the dog")
    for some, every in ((early.answer, full.answer), (early.attention, full.attention)):
        np.testing.assert_array_equal(some[:2], every[:2])
        assert not some[2:].any()


def test_memory_does_not_grow_with_the_answer(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """One mean row per layer is kept, and no rows of single tokens."""
    held, add = [], Recorder._accumulate

    def spy(self: Recorder, layer: int, call: int, row: Tensor) -> None:
        add(self, layer, call, row)
        held.append(sum(tensor.numel() for tensor in self._sums.values()))

    monkeypatch.setattr(Recorder, "_accumulate", spy)
    lvlm = variant(endless_lvlm("last_and_answer"), answer_tokens=12)
    lvlm.attend(image, "the dog")
    assert len(held) == 12 * lvlm.num_layers
    assert max(held) == held[lvlm.num_layers - 1]


def test_no_answer_is_generated_unless_it_is_read(image: Image.Image) -> None:
    lvlm = tiny_lvlm("last")
    assert lvlm.query([], lvlm.model_inputs([image], [lvlm.prompt("the dog")])) == Query()
    assert lvlm.extra_settings == {}
    assert lvlm.attend(image, "the dog").answer_logprob is None


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True])
def test_invalid_answer_tokens_are_refused(tokens: Any) -> None:
    with pytest.raises(UsageError, match="answer_tokens="):
        load_model("tiny", answer_tokens=tokens)

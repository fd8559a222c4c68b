"""Maps of the answer: every step's rows equal those of eager attention, and words are the answer's own."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from decoding import decode_without_cache, endless_lvlm, maps_of_row, variant
from family_models import tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_query_token import tiny_lvlm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from localization_heads.errors import UsageError
from localization_heads.heads.head import Head
from localization_heads.lvlm import tracing
from localization_heads.lvlm.answers.trace import (
    TokenizedText,
    Trace,
    Word,
    align_tokens,
    split_words,
    tokens_of_span,
)
from localization_heads.lvlm.checks.doctor import eager_attention
from localization_heads.lvlm.checks.footprints import coordinate_image
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import GroundingOptions
from localization_heads.options.stage_groups import TraceOptions

SAME = {"rtol": 0, "atol": 1e-5}
FAMILIES = ["llava_next", "qwen2_5_vl", "internvl", "gemma3", "mllama", "paligemma", "florence2", "janus"]
ALL = TraceOptions(keep="all")


def assert_steps_equal_eager(lvlm: LVLM, image: Image.Image, query: str, found: Trace) -> None:
    seen, num_tokens = lvlm.image_for_processor(image), len(found.token_ids)
    expected = decode_without_cache(lvlm, seen, query, num_tokens)
    assert found.token_ids == tuple(expected.tokens)
    assert found.every is not None
    for step, row in zip(found.every, expected.rows, strict=True):
        np.testing.assert_allclose(step, maps_of_row(lvlm, seen, query, row), **SAME)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_step_equals_eager_attention_without_a_cache(name: str, endless: Any) -> None:
    lvlm, image = tiny(name), coordinate_image(190, 110)
    endless(lvlm.model)
    heads = [Head(max(lvlm.attention_modules), 1), Head(min(lvlm.attention_modules), 0)]
    found = lvlm.trace(image, "the red car", heads, max_new_tokens=4, trace=ALL)
    assert len(found.token_ids) == 4
    assert_steps_equal_eager(lvlm, image, "the red car", found)
    for place, head in enumerate(heads):
        np.testing.assert_array_equal(found.rows[:, place], found.every[:, head.layer, head.head])


def test_a_sliding_window_moves_on_with_the_answer(image: Image.Image) -> None:
    """Shorter than the prompt: keys that fell out of it are not mistaken for the first ones."""
    lvlm = endless_lvlm("last", text="mistral", sliding_window=24)
    found = lvlm.trace(image, "the dog", [Head(1, 0)], max_new_tokens=6, trace=ALL)
    assert_steps_equal_eager(lvlm, image, "the dog", found)


def test_steps_equal_the_attentions_that_generate_returns(image: Image.Image) -> None:
    """`output_attentions=True` of transformers' own generation, one entry a step."""
    lvlm = endless_lvlm("last")
    inputs = lvlm.model_inputs([image], [lvlm.prompt("the dog")])
    with eager_attention(lvlm.model), torch.inference_mode():
        out = lvlm.model.generate(
            **inputs, max_new_tokens=6, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    length = inputs["input_ids"].shape[1]
    assert len(out.attentions) == 6
    found = lvlm.trace(image, "the dog", [Head(1, 0)], max_new_tokens=6, trace=ALL)
    assert list(found.token_ids) == out.sequences[0, length:].tolist()
    assert found.every is not None
    for step, layers in zip(found.every, out.attentions, strict=False):
        row = torch.stack([layer[0, :, -1, :length] for layer in layers])
        np.testing.assert_allclose(step, maps_of_row(lvlm, image, "the dog", row), **SAME)


def test_a_token_belongs_to_the_step_that_writes_or_reads_it(image: Image.Image) -> None:
    """The step that reads a token writes the next. The first token is written by the prompt's last."""
    lvlm = endless_lvlm("last")
    writes = lvlm.trace(image, "the dog", [Head(1, 0)], max_new_tokens=6)
    reads = replace(writes, step="reads")
    assert len(writes.maps) == len(reads.maps) == 6
    np.testing.assert_array_equal(reads.maps[:-1], writes.maps[1:])
    for maps, query_token in ((writes.maps, "last"), (reads.maps, "answer_first")):
        first = variant(lvlm, query_token=query_token).attend(image, "the dog").attention[1, 0]
        np.testing.assert_allclose(maps[0, 0], first, **SAME)


def test_an_answer_ends_where_the_model_ends_it(image: Image.Image) -> None:
    """Without the token that ends it; an empty answer has only the prompt's row."""
    lvlm = endless_lvlm("last")

    def trace() -> Trace:
        return lvlm.trace(image, "the dog", [Head(1, 0)], max_new_tokens=6)

    free = trace()
    first, second = free.token_ids[:2]
    assert first != second, "otherwise the answer cannot end in the middle"
    lvlm.model.generation_config.eos_token_id = [second]
    short = trace()
    assert short.token_ids == (first,)
    np.testing.assert_allclose(short.rows, free.rows[:2], **SAME)
    lvlm.model.generation_config.eos_token_id = [first]
    silent = trace()
    assert (silent.token_ids, silent.words, silent.boxes, silent.word_masses.shape) == ((), (), (), (0, 1))
    assert len(silent.rows) == 1
    with pytest.raises(ValueError, match="0 tokens"):
        silent.ground()


def test_only_the_chosen_heads_are_kept(image: Image.Image) -> None:
    """Their maps of each step, or the mean of them; other layers are not captured."""
    lvlm = endless_lvlm("last")
    heads = [Head(1, 2), Head(1, 0)]
    recorded: list[tracing.StepRecorder] = []
    made = tracing.StepRecorder.__init__

    def spy(self: tracing.StepRecorder, *arguments: Any) -> None:
        made(self, *arguments)
        recorded.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing.StepRecorder, "__init__", spy)
        found = lvlm.trace(image, "the dog", heads, max_new_tokens=5)
        mean = lvlm.trace(image, "the dog", heads, max_new_tokens=5, trace=TraceOptions(keep="mean"))
    h, w = found.rows.shape[2:]
    assert (found.every, found.rows.shape, mean.rows.shape) == (None, (6, 2, h, w), (6, 1, h, w))
    assert [set(step) for step in recorded[0].steps] == [{1}] * 6
    assert all(step[1].shape == (2, h, w) for step in recorded[0].steps)
    np.testing.assert_allclose(mean.rows[:, 0], found.rows.mean(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(mean.masses, found.masses)
    np.testing.assert_allclose(found.masses, found.rows.sum(axis=(2, 3)), rtol=1e-6)
    assert mean.boxes == found.boxes


def a_trace(**changed: Any) -> Trace:
    """`left, right` in three tokens, whose heads look to the left and to the right."""
    rows = np.full((4, 2, 4, 4), 0.001, np.float32)
    rows[0, :, 1:3, 0], rows[1, :, 3, 3], rows[2, 0, 1:3, 3], rows[3] = 0.2, 0.2, 0.4, 0.05
    known: dict[str, Any] = {
        "query": "what?",
        "spelled": TokenizedText("left, right", ((0, 4), (4, 5), (5, 11))),
        "token_ids": (5, 6, 7),
        "heads": (Head(3, 1), Head(2, 0)),
        "rows": rows,
        "masses": rows.sum(axis=(2, 3)),
        "image_box": (0.0, 0.0, 40.0, 40.0),
        "image_size": (40, 40),
        "options": GroundingOptions(sigma=0),
    }
    return Trace(**{**known, **changed})


def test_words_have_maps_boxes_and_masses() -> None:
    """By hand: cells of ten pixels; the comma's map, in a corner, is not the word's."""
    found = a_trace()
    assert [word.text for word in found.words] == ["left,", "right"]
    assert found.boxes == ((0, 10, 10, 30), (30, 10, 40, 30))
    np.testing.assert_allclose(found.word_masses, [[0.414, 0.414], [0.814, 0.016]], atol=1e-6)
    assert found.groundings[0].heads == found.heads
    assert found.ground_span("RIGHT").box == found.boxes[1]
    assert found.tokens == ("left", ",", " right")
    flat = replace(found, step="reads")
    assert flat.boxes[1] is None  # no cell stands out
    with pytest.raises(UsageError, match="answer_span='cat': the answer is 'left, right'"):
        found.ground_span("cat")


def test_a_word_of_several_tokens_has_the_mean_of_their_maps() -> None:
    found = a_trace(spelled=TokenizedText("penguins", ((0, 3), (3, 6), (6, 8))))
    (word,) = found.words
    assert word == Word("penguins", 0, 3)
    expected = found.rows[:3].mean(axis=0, dtype=np.float64).sum(axis=0)
    np.testing.assert_allclose(found.groundings[0].combined, expected, rtol=1e-6)


@given(st.text(alphabet="ab ,.-1é猫犬🐙", max_size=12))
def test_bytes_are_joined_to_characters_and_words(text: str) -> None:
    """A tokenizer of single bytes: no word is lost, and each is spelled by its own tokens."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = align_tokens(tokenizer.decode, ids)
    assert found.text == text
    assert found.places == tuple((n, n + 1) for n, letter in enumerate(text) for _ in letter.encode())
    words = split_words(found)
    assert "".join(word.text for word in words) == re.sub(r"\s", "", text)
    for word in words:
        own = tokenizer.decode(ids[word.start : word.stop])
        assert own in word.text
        assert own == word.text or not any(map(str.isalnum, word.text.replace(own, "", 1)))


def byte_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def test_control_tokens_belong_to_no_word() -> None:
    pieces = ["the", " d", "<eos>", "og"]
    found = align_tokens(lambda ids: "".join(pieces[i] for i in ids), [0, 1, 2, 3, 2], skipped=[2])
    assert found == TokenizedText("the dog", ((0, 3), (3, 5), (5, 5), (5, 7), (7, 7)))
    assert split_words(found) == (Word("the", 0, 1), Word("dog", 1, 4))


@pytest.mark.parametrize(
    ("span", "tokens"),
    [("dog", range(3, 4)), ("THE  DOG", range(2, 4)), ("do", range(0, 1)), ("hot", range(0, 1))],
)
def test_whole_words_are_preferred_to_parts_of_words(span: str, tokens: range) -> None:
    """`dog` stands in `hotdog`, which comes earlier."""
    answer = TokenizedText("hotdog and the dog.", ((0, 6), (6, 10), (10, 14), (14, 18), (18, 19)))
    assert tokens_of_span(answer, span) == tokens


@pytest.mark.parametrize("span", ["cat", "dog and", ""])
def test_a_missing_span_is_an_error_that_shows_the_answer(span: str) -> None:
    with pytest.raises(UsageError, match="the answer is 'the dog', which does not hold it"):
        tokens_of_span(TokenizedText("the dog", ((0, 3), (3, 7))), span)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2000}, "max_new_tokens=2000"),
        ({"heads": [Head(9, 0)]}, "L9H0"),
        ({"heads": [Head(0, 99)]}, "L0H99"),
        ({"trace": TraceOptions(keep="mean"), "options": GroundingOptions(combine="consensus")}, "keep=mean"),
    ],
)
def test_wrong_options_are_refused(image: Image.Image, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        tiny_lvlm("last").trace(image, "the dog", **{"heads": [Head(1, 0)], **options})


def test_the_memory_of_all_heads_maps_is_limited(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MAX_BYTES", 1 << 10)
    with pytest.raises(UsageError, match="keep=all"):
        tiny_lvlm("last").trace(image, "the dog", [Head(1, 0)], trace=ALL)


def test_the_embedded_model_points_at_what_it_names(lvlm: LVLM) -> None:
    """It lists what it sees, and each word's box lies where its map does."""
    image = Image.open("examples/images/duck_9.png").convert("RGB")
    found = lvlm.trace(image, "what is in this image?")
    assert found.heads == lvlm.known_heads
    assert [word.text for word in found.words][:1] == ["duck,"]
    assert found.boxes[0] is not None
    x0, y0, x1, y1 = found.boxes[0]
    assert x0 < 80 < x1  # the duck is on the left
    assert y0 < 96 < y1

"""`query_token=answer_span`: the mean over the tokens of a span of the answer equals that of eager attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from decoding import decode_without_cache, endless_lvlm, maps_of_row, variant
from family_models import tiny
from front import Front, one_line, write_data
from PIL import Image

from localization_heads.errors import UsageError, WorkError
from localization_heads.lvlm.answers.box_formats import FORMATS, BoxFormat
from localization_heads.lvlm.answers.trace import TokenizedText, tokens_of_match
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checks.footprints import coordinate_image
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.sharing import prepare_unshared
from localization_heads.options.groups import ModelSpec

SAME = {"rtol": 0, "atol": 1e-5}
TEXTS = ["the red car", "the dog left in this image", "car"]


DUCK, LIST = "examples/images/duck_9.png", "what is in this image?"


def spanned(lvlm: LVLM, span: str, tokens: int = 5) -> LVLM:
    return variant(lvlm, query_token="answer_span", answer_span=span, answer_tokens=tokens)


def mean_map(lvlm: LVLM, image: Image.Image, text: str, tokens: Sequence[int], length: int) -> np.ndarray:
    """The reference: the mean over some tokens of an answer of that length."""
    seen = lvlm.image_for_processor(image)
    rows = decode_without_cache(lvlm, seen, text, length).rows
    return maps_of_row(lvlm, seen, text, torch.stack([rows[1 + n] for n in tokens]).mean(0))


@pytest.mark.parametrize(
    "name", ["internvl", "mllama", "gemma3", "llava_next", "qwen2_vl", "idefics3", "paligemma", "qwen3_vl"]
)
def test_maps_equal_eager_attention_without_a_cache(name: str, endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch whose spans lie in different places, one by one, and on a shared encoding."""
    lvlm, image = spanned(tiny(name), "any"), coordinate_image(190, 110)
    endless(lvlm.model)
    spans = {TEXTS[0]: [3], TEXTS[1]: [0, 2], TEXTS[2]: [1, 2, 3]}
    monkeypatch.setattr(LVLM, "span_token_indices", lambda _self, _answer, text: spans[text])
    together = prepare_unshared(lvlm, [image] * 3, TEXTS)(None)
    shared = lvlm.encode_image(image).attend(TEXTS)
    for text, batched, other in zip(TEXTS, together, shared, strict=True):
        expected = mean_map(lvlm, image, text, spans[text], 5)
        for maps in (batched, other, lvlm.attend(image, text)):
            np.testing.assert_allclose(maps.attention, expected, **SAME)
            assert maps.answer is None


def test_a_span_is_a_part_of_the_answer(lvlm: LVLM) -> None:
    """The embedded model answers `duck, taco, tree`; the whole of it is answer_mean."""
    image = Image.open(DUCK).convert("RGB")
    for span, tokens in (("Taco", [2]), ("taco, tree", [2, 3, 4]), ("duck, taco, tree", range(5))):
        maps = spanned(lvlm, span, 8).attend(image, LIST)
        np.testing.assert_allclose(maps.attention, mean_map(lvlm, image, LIST, tokens, 5), **SAME)
        assert maps.answer_text == "duck, taco, tree"
    mean = variant(lvlm, query_token="answer_mean", answer_tokens=8)
    np.testing.assert_allclose(maps.attention, mean.attend(image, LIST).attention, **SAME)
    with pytest.raises(UsageError, match="answer_span='cat': the answer is 'duck, taco, tree', which does not"):
        spanned(lvlm, "cat").attend(image, LIST)


def test_a_span_may_hold_the_expression() -> None:
    answer = TokenizedText("a dog is here", ((0, 1), (1, 5), (5, 8), (8, 13)))
    lvlm = spanned(tiny("internvl"), "{} is")
    assert list(lvlm.span_token_indices(answer, "Dog.")) == [1, 2]


def test_box_numbers_are_a_span(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is asked for a box, and the tokens between the numbers do not count."""
    plain = tiny("internvl")
    endless(plain.model)
    form = BoxFormat("this {expression} here", r"^(\S+) \S+ (\S+)", chat=False)
    monkeypatch.setitem(FORMATS, "qwen3", form)
    lvlm, image = spanned(plain, "box", 4), coordinate_image(190, 110)
    lvlm.spec = ModelSpec("tiny", native_box="qwen3")
    assert lvlm.box_format is form
    assert lvlm.prompt("dog") == lvlm.box_prompt(form, "dog") != plain.prompt("dog")
    maps = lvlm.attend(image, "dog")
    tokens = decode_without_cache(lvlm, lvlm.image_for_processor(image), "dog", 3).tokens
    assert len(lvlm.processor.tokenizer.decode(tokens).split()) == 3
    np.testing.assert_allclose(maps.attention, mean_map(lvlm, image, "dog", [0, 2], 3), **SAME)
    monkeypatch.setitem(FORMATS, "qwen3", BoxFormat("this {expression}", r"(9)(9)", chat=False))
    with pytest.raises(UsageError, match=r"answer_span=box: the answer is '.*', which holds no box"):
        lvlm.attend(image, "dog")


def test_tokens_that_spell_numbers() -> None:
    """`[10,20,5,99]`: a token that overlaps a number counts, what stands between does not."""
    answer = TokenizedText("[10,20,5,99]", ((0, 2), (2, 3), (3, 4), (4, 6), (6, 8), (8, 9), (9, 12)))
    assert tokens_of_match(answer, r"\[(\d+),(\d+),(\d+),(\d+)\]") == [0, 1, 3, 4, 6]
    assert tokens_of_match(answer, r"(7)") == []


def test_a_different_answer_the_second_time_is_an_error(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = spanned(endless_lvlm("last"), "any")

    def other(self: LVLM, _answer: Any, _text: str) -> list[int]:
        self.model.lm_head.weight.data.neg_()
        return [1]

    monkeypatch.setattr(LVLM, "span_token_indices", other)
    with pytest.raises(WorkError, match="does not answer the same twice"):
        lvlm.attend(image, "the dog")


@pytest.mark.parametrize(
    ("query_token", "span", "said"),
    [
        ("answer_span", None, "query_token=answer_span needs answer_span="),
        ("answer_span", "  ", "query_token=answer_span needs answer_span="),
        ("last", "dog", "nothing else reads it"),
        ("answer_span", "box", "answer_span=box: embedded is not known to write boxes"),
    ],
)
def test_unusable_spans_are_refused(query_token: Any, span: str | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_model(device="cpu", query_token=query_token, answer_span=span)


def test_only_entries_whose_answer_lacks_the_span_fail(front: Front, lvlm: LVLM) -> None:
    """The others of its chunk are ranked; the reason shows its answer."""
    write_data(front.folder, 3)
    word = lvlm.trace(Image.open("image_0.png").convert("RGB"), "the dog").words[0].text.strip(",.")
    given = ("stage=find", "data_file=data.jsonl", "query_token=answer_span", "report=false", "num_trials=1")
    result = front.finder(*given, f"answer_span={word}")
    assert (front.out / "heads.json").is_file(), result.err
    nothing = front.finder(*given, "answer_span=zebras fly")
    assert nothing.status == 1
    assert "answer_span='zebras fly': the answer is" in one_line(nothing.err) + nothing.out
    assert front.finder("stage=find", "query_token=last", "answer_span=dog").status == 2

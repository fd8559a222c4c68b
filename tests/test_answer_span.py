"""`query_token=answer_span`: the mean over the tokens of a span of the answer equals that of eager attention."""

from __future__ import annotations

import copy
from typing import Any

import family_models_siblings  # noqa: F401 -- more of tiny's families
import numpy as np
import pytest
import torch
from family_models import tiny
from front import Front, one_line, write_data
from PIL import Image
from test_answer_tokens import on_image
from test_query_token import tiny_lvlm
from test_tracing import steps_without_cache

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


def spanned(lvlm: LVLM, span: str, tokens: int = 5) -> LVLM:
    lvlm = copy.copy(lvlm)
    lvlm.query_token, lvlm.answer_span, lvlm.answer_tokens = "answer_span", span, tokens
    return lvlm


@pytest.mark.parametrize(
    "name", ["internvl", "mllama", "gemma3", "llava_next", "qwen2_vl", "idefics3", "paligemma", "qwen3_vl"]
)
def test_equals_eager_without_a_cache(name: str, endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch whose spans lie in different places, one by one, and on a shared encoding."""
    lvlm, image = spanned(tiny(name), "any"), coordinate_image(190, 110)
    endless(lvlm.model)
    places = {TEXTS[0]: [3], TEXTS[1]: [0, 2], TEXTS[2]: [1, 2, 3]}
    monkeypatch.setattr(LVLM, "span_token_indices", lambda _self, _answer, text: places[text])
    seen = lvlm.image_for_processor(image)
    together = prepare_unshared(lvlm, [image] * 3, TEXTS)(None)
    shared = lvlm.encode_image(image).attend(TEXTS)
    for text, batched, other in zip(TEXTS, together, shared, strict=True):
        rows, _ = steps_without_cache(lvlm, seen, text, 5)
        expected = on_image(lvlm, seen, text, torch.stack([rows[1 + n] for n in places[text]]).mean(0))
        for found in (batched, other, lvlm.attend(image, text)):
            np.testing.assert_allclose(found.attention, expected, **SAME)
            assert found.answer is None


def test_the_span_is_a_text_of_the_answer(lvlm: LVLM) -> None:
    """The embedded model says `duck, taco, tree`; the whole of it is answer_mean."""
    image = Image.open("examples/images/duck_9.png").convert("RGB")
    query = "what is in this image?"
    rows, tokens = steps_without_cache(lvlm, lvlm.image_for_processor(image), query, 5)
    assert lvlm.processor.tokenizer.decode(tokens) == "duck, taco, tree"
    for span, places in (("Taco", [2]), ("taco, tree", [2, 3, 4]), ("duck, taco, tree", range(5))):
        found = spanned(lvlm, span, 8).attend(image, query)
        expected = torch.stack([rows[1 + n] for n in places]).mean(0)
        np.testing.assert_allclose(
            found.attention, on_image(lvlm, lvlm.image_for_processor(image), query, expected), **SAME
        )
        assert found.answer_text == "duck, taco, tree"
    mean = spanned(lvlm, "duck, taco, tree", 8)
    mean.query_token = "answer_mean"
    np.testing.assert_allclose(found.attention, mean.attend(image, query).attention, **SAME)


def test_a_span_may_hold_the_expression() -> None:
    answer = TokenizedText("a dog is here", ((0, 1), (1, 5), (5, 8), (8, 13)))
    lvlm = spanned(tiny("internvl"), "{} is")
    assert list(lvlm.span_token_indices(answer, "Dog.")) == [1, 2]


def test_a_span_that_is_not_there_shows_the_answer(lvlm: LVLM) -> None:
    image = Image.open("examples/images/duck_9.png").convert("RGB")
    with pytest.raises(
        UsageError, match="answer_span='cat': the answer is 'duck, taco, tree', which does not"
    ):
        spanned(lvlm, "cat").attend(image, "what is in this image?")


def test_the_numbers_of_a_box(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is asked for a box, and the tokens between the numbers do not count."""
    plain = tiny("internvl")
    endless(plain.model)
    monkeypatch.setitem(
        FORMATS, "qwen3", BoxFormat("this {expression} here", r"^(\S+) \S+ (\S+)", chat=False)
    )
    lvlm, image = spanned(plain, "box", 4), coordinate_image(190, 110)
    lvlm.spec = ModelSpec("tiny", native_box="qwen3")
    assert lvlm.box_format is FORMATS["qwen3"]
    assert lvlm.prompt("dog") == lvlm.box_prompt(FORMATS["qwen3"], "dog")
    assert plain.prompt("dog") != lvlm.prompt("dog")
    found = lvlm.attend(image, "dog")
    rows, tokens = steps_without_cache(lvlm, lvlm.image_for_processor(image), "dog", 3)
    said = lvlm.processor.tokenizer.decode(tokens).split()
    assert len(said) == 3
    expected = on_image(lvlm, lvlm.image_for_processor(image), "dog", torch.stack([rows[1], rows[3]]).mean(0))
    np.testing.assert_allclose(found.attention, expected, **SAME)
    monkeypatch.setitem(FORMATS, "qwen3", BoxFormat("this {expression}", r"(9)(9)", chat=False))
    with pytest.raises(UsageError, match=r"answer_span=box: the answer is '.*', which holds no box"):
        lvlm.attend(image, "dog")


def test_tokens_of_numbers() -> None:
    """`[10,20,5,99]`: a token that reaches into a number counts, what stands between does not."""
    answer = TokenizedText("[10,20,5,99]", ((0, 2), (2, 3), (3, 4), (4, 6), (6, 8), (8, 9), (9, 12)))
    assert tokens_of_match(answer, r"\[(\d+),(\d+),(\d+),(\d+)\]") == [0, 1, 3, 4, 6]
    assert tokens_of_match(answer, r"(7)") == []


def test_another_answer_the_second_time_is_an_error(
    image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    lvlm = spanned(tiny_lvlm("last"), "any")
    lvlm.model.generation_config.eos_token_id = None

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
def test_spans_that_cannot_be_read_are_refused(query_token: Any, span: str | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_model(device="cpu", query_token=query_token, answer_span=span)


def test_an_entry_whose_answer_lacks_the_span_fails_alone(front: Front, lvlm: LVLM) -> None:
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

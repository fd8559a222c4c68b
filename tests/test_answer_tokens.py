"""`query_token=answer_mean` and `last_and_answer`: the answer's rows equal those of eager attention, one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import family_models_tiled  # noqa: F401 -- more of tiny's families
import numpy as np
import pytest
import torch
from family_models import tiny
from PIL import Image
from test_query_token import tiny_lvlm
from torch import Tensor

from localization_heads.errors import UsageError
from localization_heads.lvlm.attention_model import SampleAttention
from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.checks.doctor import eager_attention
from localization_heads.lvlm.checks.footprints import coordinate_image
from localization_heads.lvlm.forward.capture import Query, Recorder
from localization_heads.lvlm.model import LVLM
from localization_heads.lvlm.sharing import prepare_unshared

SAME = {"rtol": 0, "atol": 1e-5}
EXPRESSIONS = ["the red car", "the dog left in this image", "car"]
FAMILIES = [
    "qwen2_vl", "internvl", "idefics3", "paligemma", "gemma3", "mllama", "llava_next", "florence2",
    "gemma4",
]  # fmt: skip


class Expected(NamedTuple):
    """Of one prompt: the last token's row, the mean of the answer's, `[layer, head, key]`, and what was generated."""

    last: Tensor
    answer: Tensor | None
    tokens: list[int]
    logprob: float


def without_cache(lvlm: LVLM, image: Image.Image, expression: str, most: int, ends: list[int]) -> Expected:
    """The obvious way: the whole prompt, longer by a token each time, through eager attention, and no cache."""
    inputs = dict(lvlm.model_inputs([image], [lvlm.prompt(expression)]))
    inputs.pop("labels", None)
    across, decodes = lvlm.uses_cross_attention, lvlm.model.config.is_encoder_decoder
    T = inputs["input_ids"].shape[1]
    tokens: list[int] = []
    rows: list[Tensor] = []
    logprob = 0.0
    decoded = [lvlm.model.config.text_config.decoder_start_token_id] if decodes else []
    with eager_attention(lvlm.model), torch.inference_mode():
        for step in range(most + 1):
            given = {**inputs, "decoder_input_ids": torch.tensor([decoded])} if decodes else inputs
            with layers_of(lvlm) as seen:
                logits = lvlm.model(**given, use_cache=False).logits[0, -1]
            found = torch.stack([seen[layer] for layer in sorted(seen)])
            rows.append(found if across else found[..., :T])
            token = int(logits.argmax())
            if step == 0:
                logprob = float(torch.log_softmax(logits.float(), -1)[token])
            if token in ends:
                break
            tokens.append(token)
            if decodes:
                decoded.append(token)
            else:
                inputs = longer(inputs, token)
    answer = rows[1 : most + 1]
    return Expected(rows[0], torch.stack(answer).mean(0) if answer else None, tokens[:most], logprob)


class layers_of:  # noqa: N801 -- a `with` block
    """Collects the last row (H, K) of each attention module's own weights."""

    def __init__(self, lvlm: LVLM) -> None:
        self.lvlm = lvlm

    def __enter__(self) -> dict[int, Tensor]:
        rows: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                rows[layer] = output[1][0, :, -1].float()

            return hook

        modules = self.lvlm.attention_modules.items()
        self.handles = [module.register_forward_hook(keep(layer)) for layer, module in modules]
        return rows

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def longer(inputs: dict[str, Any], token: int) -> dict[str, Any]:
    """The inputs with one token more; what kind a token is: text."""
    added = dict(inputs)
    for name, new in (
        ("input_ids", token),
        ("attention_mask", 1),
        ("token_type_ids", 0),
        ("mm_token_type_ids", 0),
    ):
        if name in inputs:
            added[name] = torch.cat([inputs[name], torch.full_like(inputs[name][:, -1:], new)], 1)
    if "cross_attention_mask" in inputs:
        mask = inputs["cross_attention_mask"]
        added["cross_attention_mask"] = torch.cat([mask, mask[:, -1:]], 1)
    return added


def on_image(lvlm: LVLM, image: Image.Image, expression: str, row: Tensor) -> np.ndarray:
    """A row [layer, head, key] as maps."""
    inputs = lvlm.model_inputs([image], [lvlm.prompt(expression)])
    full = torch.zeros(lvlm.num_layers, *row.shape[1:])
    full[sorted(lvlm.attention_modules)] = row
    return lvlm.maps(
        SampleAttention(full), lvlm.views_of_images(inputs, 0, image), image, expression, ""
    ).attention


def asked(name: str, query_token: str, tokens: int = 4) -> LVLM:
    lvlm = copy.copy(tiny(name))
    lvlm.query_token, lvlm.answer_tokens = query_token, tokens
    return lvlm


@pytest.fixture
def ending() -> Iterator[Any]:
    """Makes a model end its answers at given tokens; afterwards it ends them as before."""
    changed: list[tuple[Any, Any]] = []

    def end(model: Any, tokens: list[int] | None) -> None:
        changed.append((model.generation_config, model.generation_config.eos_token_id))
        model.generation_config.eos_token_id = tokens

    yield end
    for config, tokens in reversed(changed):
        config.eos_token_id = tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_eager_without_a_cache(name: str, ending: Any) -> None:
    """In a batch in which one answer ends at once, one in the middle, and one not at all; and one by one."""
    lvlm, image = asked(name, "last_and_answer"), coordinate_image(190, 110)
    seen = lvlm.image_for_processor(image)
    free = [without_cache(lvlm, seen, text, 4, []) for text in EXPRESSIONS]
    ends = [free[1].tokens[2], free[2].tokens[0]]
    ending(lvlm.model, ends)
    together = prepare_unshared(lvlm, [image] * 3, EXPRESSIONS)(None)
    shared = lvlm.encode_image(image).attend(EXPRESSIONS)
    for text, batched, other in zip(EXPRESSIONS, together, shared, strict=True):
        expected = without_cache(lvlm, seen, text, 4, ends)
        alone = lvlm.attend(image, text)
        for found in (alone, batched, other):
            np.testing.assert_allclose(found.attention, on_image(lvlm, seen, text, expected.last), **SAME)
            assert found.answer_logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert (found.answer is None) == (expected.answer is None)
            if expected.answer is not None:
                np.testing.assert_allclose(found.answer, on_image(lvlm, seen, text, expected.answer), **SAME)


@pytest.mark.parametrize("text", ["mistral", "gemma2"])
def test_equals_eager_with_a_window(image: Image.Image, text: str) -> None:
    """A sliding window shorter than the prompt, which moves on with the answer."""
    options: dict[str, Any] = {"text": text, "sliding_window": 24}
    if text == "gemma2":
        options |= {"head_dim": 8, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 2.0}
    kernel = "eager" if text == "gemma2" else "sdpa"
    lvlm = tiny_lvlm("last_and_answer", attention=kernel, **options)
    # An image token that is said cannot be read again without a cache.
    lvlm.model.lm_head.weight.data[lvlm.image_token_id] = 0
    lvlm.model.generation_config.eos_token_id = None
    for text in EXPRESSIONS:
        expected = without_cache(lvlm, image, text, 8, [])
        for found in (lvlm.attend(image, text), *lvlm.encode_image(image).attend([text])):
            assert found.answer is not None
            np.testing.assert_allclose(found.answer, on_image(lvlm, image, text, expected.answer), **SAME)


def test_the_embedded_model() -> None:
    lvlm = load_model("tiny", query_token="last_and_answer")
    image = coordinate_image(192, 144)
    texts = ["the dog", "the red owl on the left", "a cat"]
    end = lvlm.model.generation_config.eos_token_id
    for text, batched in zip(texts, lvlm.attend_batch([image.copy() for _ in texts], texts), strict=True):
        seen = lvlm.image_for_processor(image)
        expected = without_cache(lvlm, seen, text, 8, [end])
        words = lvlm.processor.tokenizer.decode(expected.tokens, skip_special_tokens=True)
        for found in (batched, *lvlm.ask(image, [text])):
            assert found.answer_text == " ".join(words.split())
            assert expected.answer is not None
            np.testing.assert_allclose(found.answer, on_image(lvlm, seen, text, expected.answer), **SAME)


def test_answer_mean_is_the_answer_of_both(image: Image.Image) -> None:
    """And the last prompt token's where the model answers nothing."""
    both, mean, last = (tiny_lvlm(kind) for kind in ("last_and_answer", "answer_mean", "last"))
    two, one, plain = (lvlm.attend(image, "the dog") for lvlm in (both, mean, last))
    np.testing.assert_array_equal(one.attention, two.answer)
    np.testing.assert_allclose(two.attention, plain.attention, **SAME)
    assert one.answer is None
    assert abs(one.attention - plain.attention).max() > 1e-4
    first = without_cache(mean, image, "the dog", 1, []).tokens[0]
    mean.model.generation_config.eos_token_id = [first]
    silent = mean.attend(image, "the dog")
    np.testing.assert_allclose(silent.attention, plain.attention, **SAME)
    assert (silent.answer, silent.answer_text) == (None, "")


def test_answer_tokens_bound_what_is_read(image: Image.Image) -> None:
    lvlm = tiny_lvlm("last_and_answer")
    lvlm.model.generation_config.eos_token_id = None
    lvlm.answer_tokens = 1
    short = lvlm.attend(image, "the dog").answer
    first = tiny_lvlm("answer_first").attend(image, "the dog").attention
    np.testing.assert_allclose(short, first, **SAME)
    lvlm.answer_tokens = 3
    assert abs(lvlm.attend(image, "the dog").answer - short).max() > 1e-5


def test_early_exit_keeps_the_lower_layers(image: Image.Image) -> None:
    lvlm = tiny_lvlm("last_and_answer")
    early, full = lvlm.attend(image, "the dog", last_layer=1), lvlm.attend(image, "the dog")
    assert early.answer is not None
    np.testing.assert_array_equal(early.answer[:2], full.answer[:2])
    np.testing.assert_array_equal(early.attention[:2], full.attention[:2])
    assert not early.answer[2:].any()
    assert not early.attention[2:].any()


def test_a_recorder_keeps_one_mean_a_layer(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the answer: no rows of single tokens."""
    held = []
    add = Recorder._add

    def spy(self: Recorder, layer: int, call: int, row: Tensor) -> None:
        add(self, layer, call, row)
        held.append(sum(tensor.numel() for tensor in self._sums.values()))

    monkeypatch.setattr(Recorder, "_add", spy)
    lvlm = tiny_lvlm("last_and_answer")
    lvlm.model.generation_config.eos_token_id = None
    lvlm.answer_tokens = 12
    lvlm.attend(image, "the dog")
    assert len(held) == 12 * lvlm.num_layers
    assert max(held) == held[lvlm.num_layers - 1]


def test_no_query_asks_for_an_answer_unless_it_is_read(image: Image.Image) -> None:
    lvlm = tiny_lvlm("last")
    assert lvlm.query([], lvlm.model_inputs([image], [lvlm.prompt("the dog")])) == Query()
    assert lvlm.wording == {}
    assert lvlm.attend(image, "the dog").answer_logprob is None


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True])
def test_wrong_answer_tokens(tokens: Any) -> None:
    with pytest.raises(UsageError, match="answer_tokens="):
        load_model("tiny", answer_tokens=tokens)

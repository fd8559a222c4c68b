"""Heads switched off, compared with a copy of the model whose output projection has zero weights for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from family_models import tiny
from PIL import Image
from torch import nn

import localization_heads as lh
from localization_heads.errors import UsageError
from localization_heads.lvlm.conversation import Conversation
from localization_heads.lvlm.forward.capture import attention_modules
from localization_heads.lvlm.interventions.switching import output_projection
from localization_heads.lvlm.model import LVLM

FAMILIES = ["llava", "llava_siglip", "llava_next", "qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v", "deepseek_vl"]
FAMILIES += ["paligemma2", "internvl", "idefics3", "gemma3", "gemma3n", "mllama", "florence2", "aya_vision"]
FAMILIES += ["llama4", "lfm2_vl", "kimi_k25", "gemma4"]
CLOSE = {"rtol": 0, "atol": 1e-5}


def two_heads(lvlm: LVLM) -> list[tuple[int, int]]:
    """The last head of the first layer that sees the image, and the second of the last."""
    layers = sorted(lvlm.attention_modules)
    return [(layers[0], lvlm.num_heads - 1), (layers[-1], 1)]


@pytest.fixture
def inputs(lvlm: LVLM, image: Image.Image) -> Mapping[str, Any]:
    return lvlm.model_inputs([image], [lvlm.prompt("the dog")])


def logits(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    decoder = {"decoder_input_ids": torch.tensor([[2]])} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model(**inputs, **decoder, use_cache=False).logits


def without_weights(lvlm: LVLM, heads: Sequence[tuple[int, int]]) -> nn.Module:
    """A copy of the model whose output projections have zero weights for the heads."""
    copy = deepcopy(lvlm.model)
    modules = attention_modules(copy)
    for layer, head in heads:
        projection = next(part for name, part in modules[layer].named_children() if name in ("o_proj", "out_proj"))
        size = projection.weight.shape[1] // lvlm.num_heads
        with torch.no_grad():
            projection.weight[:, head * size : (head + 1) * size] = 0
    return copy


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_equals_a_projection_without_weights(name: str) -> None:
    lvlm = tiny(name)
    heads = two_heads(lvlm)
    inputs = lvlm.model_inputs([Image.new("RGB", (150, 110), (90, 20, 60))], [lvlm.prompt("the red car")])
    plain = logits(lvlm.model, inputs)
    with lh.switch_off(lvlm, heads):
        off = logits(lvlm.model, inputs)
    torch.testing.assert_close(off, logits(without_weights(lvlm, heads), inputs), **CLOSE)
    assert (off - plain).abs().max() > 1e-6
    assert torch.equal(logits(lvlm.model, inputs), plain)


def test_several_heads_of_the_embedded_model(lvlm: LVLM, inputs: Mapping[str, Any]) -> None:
    heads = [(4, 4), (5, 6), (5, 3)]
    expected = logits(without_weights(lvlm, heads), inputs)
    with lh.switch_off(lvlm, heads):
        torch.testing.assert_close(logits(lvlm.model, inputs), expected, **CLOSE)


def test_mean_equals_the_mean_by_hand(image: Image.Image) -> None:
    """The slice of every token is the mean over the tokens that are not padding, also in a padded batch."""
    lvlm, (layer, head) = tiny("llava"), (1, 2)
    inputs = lvlm.model_inputs([image, image], [lvlm.prompt("the red car"), lvlm.prompt("dog")])
    seen: list[torch.Tensor] = []

    def run() -> None:
        hook = output_projection(lvlm, layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        logits(lvlm.model, inputs)
        hook.remove()

    run()
    with lh.switch_off(lvlm, [(layer, head)], how="mean"):
        run()
    before, after = seen
    size = before.shape[-1] // lvlm.num_heads
    own = torch.zeros(before.shape[-1], dtype=torch.bool)
    own[head * size : (head + 1) * size] = True
    assert not inputs["attention_mask"].all()
    for sample, mask in enumerate(inputs["attention_mask"].bool()):
        mean = before[sample, mask][:, own].mean(0)
        torch.testing.assert_close(after[sample][:, own], mean.expand(before.shape[1], -1), **CLOSE)
    assert torch.equal(before[..., ~own], after[..., ~own])


def test_mean_while_generating(lvlm: LVLM, inputs: Mapping[str, Any]) -> None:
    """The answer's tokens get the prompt's mean: generation is the same with a cache and without."""
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_scores": True}
    with lh.switch_off(lvlm, [(2, 0), (4, 4)], how="mean"), torch.inference_mode():
        made = lvlm.model.generate(**inputs, **options, return_dict_in_generate=True)
        first = lvlm.model(**inputs).logits[0, -1]
    torch.testing.assert_close(made.scores[0][0], first, **CLOSE)


def test_no_head_nested_blocks_and_errors(lvlm: LVLM, inputs: Mapping[str, Any]) -> None:
    """No head changes nothing; nested blocks add up; an error restores the model."""
    plain = logits(lvlm.model, inputs)
    for how in ("zero", "mean"):
        with lh.switch_off(lvlm, [], how=how):  # type: ignore[arg-type]
            assert not lvlm.changes
            assert torch.equal(logits(lvlm.model, inputs), plain)
    with lh.switch_off(lvlm, [(4, 4), (5, 6)]):
        both = logits(lvlm.model, inputs)
    with lh.switch_off(lvlm, [(4, 4)]), lh.switch_off(lvlm, [(5, 6)]):
        assert torch.equal(logits(lvlm.model, inputs), both)
    with pytest.raises(ZeroDivisionError), lh.switch_off(lvlm, [(4, 4)]), lh.switch_off(lvlm, [(5, 6)]):
        _ = 1 / 0
    assert not lvlm.changes
    assert torch.equal(logits(lvlm.model, inputs), plain)


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_encoded_images_follow_the_change(lvlm: LVLM, image: Image.Image, how: Any) -> None:
    """An image that was encoded before, inside or after the block gives the maps of the model as it then is."""
    encoded, heads = lvlm.encode_image(image), [(2, 0), (3, 1)]

    def ways() -> list[np.ndarray]:
        asked = ["the dog", "the red car"]
        if how == "mean":
            return [maps.attention for maps in (*encoded.attend(["the dog"]), lvlm.attend(image, "the dog"))]
        return [
            encoded.attend(["the dog"])[0].attention,
            lvlm.ask(image, asked)[0].attention,
            lvlm.attend_batch([image, image], asked)[0].attention,
            lvlm.attend(image, "the dog").attention,
        ]

    *others, plain = ways()
    with lh.switch_off(lvlm, heads, how=how):
        *others_off, off = ways()
        inside = lvlm.encode_image(image)
    *others_after, after = ways()
    for one in (*others, *others_after, inside.attend(["the dog"])[0].attention):
        np.testing.assert_allclose(one, plain, **CLOSE)
    for one in others_off:
        np.testing.assert_allclose(one, off, **CLOSE)
    assert np.array_equal(after, plain)
    assert np.abs(off - plain).max() > 1e-4


def test_answers_change_and_come_back(lvlm: LVLM) -> None:
    """Three layers without heads: a conversation, which generates in another thread, gives another answer."""
    image = Image.open("examples/images/duck_9.png").convert("RGB")

    def say() -> str:
        return "".join(Conversation(lvlm, image, 6).ask("the duck"))

    before = say()
    with lh.switch_off(lvlm, [(layer, head) for layer in (3, 4, 5) for head in range(8)]):
        assert say() != before
    assert say() == before


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([(9, 0)], "there is no L9H0"),
        ([(0, 8)], "there is no L0H8; the layers are 0 to 5 and the heads 0 to 7"),
        ([(-1, 0)], "there is no L-1H0"),
        (["four"], "names no head"),
        ([7], "names no head"),
    ],
)
def test_unknown_heads_are_refused(lvlm: LVLM, heads: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught, lh.switch_off(lvlm, heads):
        pass
    assert "\n" not in str(caught.value)
    assert not lvlm.changes


def test_unsupported_models_and_modes_are_refused(lvlm: LVLM) -> None:
    with pytest.raises(UsageError, match="layer 0 has no heads that see the image"):  # linear attention
        lh.switch_off(tiny("qwen3_5"), [(0, 0)]).__enter__()
    copy = LVLM(deepcopy(lvlm.model), lvlm.processor, lvlm.spec, system="", conv_mode="plain")
    module = copy.attention_modules[5]
    module.o_proj = nn.Linear(200, 128)
    with pytest.raises(UsageError, match="takes 200 values, but there are 8 heads of 24, so"):
        lh.switch_off(copy, [(5, 6)]).__enter__()
    module.mixer, module.o_proj = module.o_proj, None
    with pytest.raises(UsageError, match="has no output projections of a known name"):
        lh.switch_off(copy, [(5, 6)]).__enter__()
    with pytest.raises(UsageError, match="choose zero or mean"):
        lh.switch_off(copy, [(4, 6)], how="half").__enter__()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is a single token"):
        lh.switch_off(tiny("florence2"), [(0, 0)], how="mean").__enter__()

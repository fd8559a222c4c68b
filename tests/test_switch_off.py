"""Heads switched off, against a copy of the model whose projection has no weights for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from family_models import tiny
from family_models_tiled import gemma3  # noqa: F401 -- registers the other half of the families
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


def logits(lvlm: LVLM, model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    decoder = {"decoder_input_ids": torch.tensor([[2]])} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model(**inputs, **decoder, use_cache=False).logits


def without_rows(lvlm: LVLM, heads: Sequence[tuple[int, int]]) -> nn.Module:
    """A copy of the model in which what the heads write is multiplied by zero weights."""
    copy = deepcopy(lvlm.model)
    modules = attention_modules(copy)
    for layer, head in heads:
        projection = next(
            part for name, part in modules[layer].named_children() if name in ("o_proj", "out_proj")
        )
        size = projection.weight.shape[1] // lvlm.num_heads
        with torch.no_grad():
            projection.weight[:, head * size : (head + 1) * size] = 0
    return copy


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_is_a_projection_without_weights(name: str) -> None:
    lvlm = tiny(name)
    heads = two_heads(lvlm)
    inputs = lvlm.model_inputs([Image.new("RGB", (150, 110), (90, 20, 60))], [lvlm.prompt("the red car")])
    plain = logits(lvlm, lvlm.model, inputs)
    with lh.switch_off(lvlm, heads):
        off = logits(lvlm, lvlm.model, inputs)
    torch.testing.assert_close(off, logits(lvlm, without_rows(lvlm, heads), inputs), **CLOSE)
    assert (off - plain).abs().max() > 1e-6
    assert torch.equal(logits(lvlm, lvlm.model, inputs), plain)


def test_the_embedded_model_is_as_without_the_weights(lvlm: LVLM, image: Image.Image) -> None:
    heads = [(4, 4), (5, 6), (5, 3)]
    inputs = lvlm.model_inputs([image], [lvlm.prompt("the dog")])
    expected = logits(lvlm, without_rows(lvlm, heads), inputs)
    with lh.switch_off(lvlm, heads):
        torch.testing.assert_close(logits(lvlm, lvlm.model, inputs), expected, **CLOSE)


def test_mean_by_hand(image: Image.Image) -> None:
    """The slice of every token is the mean over the tokens that are no padding, also in a padded batch."""
    lvlm, (layer, head) = tiny("llava"), (1, 2)
    projection, seen = output_projection(lvlm, layer), []
    inputs = lvlm.model_inputs([image, image], [lvlm.prompt("the red car"), lvlm.prompt("dog")])
    keep = projection.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    logits(lvlm, lvlm.model, inputs)
    keep.remove()
    with lh.switch_off(lvlm, [(layer, head)], how="mean"):
        keep = projection.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
        logits(lvlm, lvlm.model, inputs)
        keep.remove()
    before, after = seen
    size = before.shape[-1] // lvlm.num_heads
    own = slice(head * size, (head + 1) * size)
    for sample, mask in enumerate(inputs["attention_mask"].bool()):
        mean = torch.stack(
            [row for row, real in zip(before[sample, :, own], mask, strict=True) if real]
        ).mean(0)
        torch.testing.assert_close(after[sample, :, own], mean.expand(before.shape[1], -1), **CLOSE)
    assert not inputs["attention_mask"].all()
    others = [column for column in range(before.shape[-1]) if not own.start <= column < own.stop]
    assert torch.equal(before[..., others], after[..., others])


def test_mean_while_answering(lvlm: LVLM, image: Image.Image) -> None:
    """Tokens of the answer get the prompt's mean: generation is the same with a cache and without."""
    inputs = lvlm.model_inputs([image], [lvlm.prompt("the dog")])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_scores": True}
    with lh.switch_off(lvlm, [(2, 0), (4, 4)], how="mean"), torch.inference_mode():
        made = lvlm.model.generate(**inputs, **options, return_dict_in_generate=True)
        first = lvlm.model(**inputs).logits[0, -1]
    torch.testing.assert_close(made.scores[0][0], first, **CLOSE)


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_no_head_changes_nothing(lvlm: LVLM, image: Image.Image, how: Any) -> None:
    inputs = lvlm.model_inputs([image], [lvlm.prompt("the dog")])
    plain = logits(lvlm, lvlm.model, inputs)
    with lh.switch_off(lvlm, [], how=how):
        assert not lvlm.changes
        assert torch.equal(logits(lvlm, lvlm.model, inputs), plain)


def test_nested_blocks_add_up_and_errors_undo_them(lvlm: LVLM, image: Image.Image) -> None:
    inputs = lvlm.model_inputs([image], [lvlm.prompt("the dog")])
    plain = logits(lvlm, lvlm.model, inputs)
    with lh.switch_off(lvlm, [(4, 4), (5, 6)]):
        both = logits(lvlm, lvlm.model, inputs)
    with lh.switch_off(lvlm, [(4, 4)]), lh.switch_off(lvlm, [(5, 6)]):
        assert torch.equal(logits(lvlm, lvlm.model, inputs), both)
    with pytest.raises(ZeroDivisionError), lh.switch_off(lvlm, [(4, 4)]), lh.switch_off(lvlm, [(5, 6)]):
        _ = 1 / 0
    assert not lvlm.changes
    assert torch.equal(logits(lvlm, lvlm.model, inputs), plain)


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_encoded_images_do_not_leak(lvlm: LVLM, image: Image.Image, how: Any) -> None:
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
    for found, expected in [(others, plain), (others_off, off), (others_after, plain)]:
        for one in found:
            np.testing.assert_allclose(one, expected, **CLOSE)
    assert np.array_equal(after, plain)
    assert np.abs(off - plain).max() > 1e-4
    np.testing.assert_allclose(inside.attend(["the dog"])[0].attention, plain, **CLOSE)


def test_answers_change_and_come_back(lvlm: LVLM) -> None:
    """A whole layer less: a conversation in another thread says something else."""
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
def test_heads_that_do_not_exist(lvlm: LVLM, heads: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught, lh.switch_off(lvlm, heads):
        pass
    assert "\n" not in str(caught.value)
    assert not lvlm.changes


def test_layers_without_such_heads() -> None:
    with pytest.raises(UsageError, match="layer 0 has no heads that see the image"):  # linear attention
        lh.switch_off(tiny("qwen3_5"), [(0, 0)]).__enter__()


def test_unknown_projections_are_refused(lvlm: LVLM) -> None:
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

"""Heads steered towards a region, compared with eager attention and with the softmax written out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from family_models import tiny
from PIL import Image
from tiny_models import llava_model, llava_processor
from transformers import AttentionInterface

import localization_heads as lh
from localization_heads.errors import UsageError
from localization_heads.lvlm.forward.capture import capture
from localization_heads.lvlm.interventions.switching import output_projection
from localization_heads.lvlm.model import LVLM
from localization_heads.options.groups import ModelSpec

FAMILIES = ["llava", "llava_siglip", "llava_next", "qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v", "deepseek_vl"]
FAMILIES += ["paligemma2", "internvl", "gemma3", "mllama", "florence2", "llama4", "kimi_k25"]
FAMILIES += ["lfm2_vl", "gemma4", "gemma3n"]
CLOSE = {"rtol": 0, "atol": 1e-5}
REGION = (10.0, 10.0, 60.0, 50.0)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (110, 150, 3), dtype=np.uint8))


@contextmanager
def kernel(lvlm: LVLM, name: str) -> Iterator[None]:
    before = lvlm.model.config.get_text_config()._attn_implementation
    lvlm.model.set_attn_implementation(name)
    try:
        yield
    finally:
        lvlm.model.set_attn_implementation(before)


def two_prompts(lvlm: LVLM) -> dict[str, Any]:
    prompts = [lvlm.prompt("the red car"), lvlm.prompt("the dog left in this image")]
    return lvlm.model_inputs([PICTURE, PICTURE], prompts)


def rows_and_written(lvlm: LVLM) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """By layer, the captured rows (B, H, K), and what the heads write (tokens, H x D), of two prompts in a batch."""
    inputs, decodes = two_prompts(lvlm), lvlm.model.config.is_encoder_decoder
    decoder = {"decoder_input_ids": torch.tensor([[2], [2]])} if decodes else {}
    written: dict[int, torch.Tensor] = {}
    with ExitStack() as hooks, torch.inference_mode(), capture(lvlm.attention_modules) as recorder:
        for layer in lvlm.attention_modules:
            hook = output_projection(lvlm, layer).register_forward_pre_hook(
                lambda _, args, layer=layer: written.update({layer: args[0].clone()})
            )
            hooks.callback(hook.remove)
        lvlm.model(**inputs, **decoder, use_cache=False)
    if not decodes:  # leave out padding
        written = {layer: values[inputs["attention_mask"].bool()] for layer, values in written.items()}
    return recorder.rows, written


def region_mass(lvlm: LVLM, rows: torch.Tensor, sample: int) -> torch.Tensor:
    """(H,) the attention of a row (B, H, K) on the cells that overlap the region, cell by cell."""
    total = torch.zeros(rows.shape[1])
    for view in lvlm.views_in(two_prompts(lvlm), sample, PICTURE):
        for (row, column), key in np.ndenumerate(view.index):
            across = view.x_edges[column] < REGION[2] and view.x_edges[column + 1] > REGION[0]
            down = view.y_edges[row] < REGION[3] and view.y_edges[row + 1] > REGION[1]
            if across and down:
                total += rows[sample, :, int(key)]
    return total


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_steered_head_gains_odds_on_the_region(name: str) -> None:
    """The head gets `exp(strength)` times the odds on the region, with sdpa and eager; no other head changes.

    Nor does any other slice of the output projection's input.
    """
    lvlm, strength = tiny(name), 1.5
    head = lvlm.num_heads - 1
    plain, plain_written = rows_and_written(lvlm)
    # Some layers see the last tokens only, through a sliding window or a chunk.
    seeing = [one for one in plain if region_mass(lvlm, plain[one], 0)[head] > 1e-4]
    if not seeing:
        pytest.skip(f"the last token of {name} sees the chunk of text alone")
    layer = max(seeing)
    with lh.steer(lvlm, [(layer, head)], REGION, strength):
        steered, written = rows_and_written(lvlm)
    for sample in (0, 1):
        before, after = region_mass(lvlm, plain[layer], sample), region_mass(lvlm, steered[layer], sample)
        odds = np.exp(strength) * before[head]
        torch.testing.assert_close(after[head], odds / (odds + 1 - before[head]), **CLOSE)
        assert after[head] > before[head] + 1e-4
    others = [other for other in range(lvlm.num_heads) if other != head]
    torch.testing.assert_close(steered[layer][:, others], plain[layer][:, others], **CLOSE)
    size = written[layer].shape[-1] // lvlm.num_heads
    change = (written[layer] - plain_written[layer]).abs().flatten(0, -2)
    changed = change.amax(0).reshape(lvlm.num_heads, size).amax(1)
    assert changed[head] > 1e-6
    assert changed[others].max() < 1e-5
    if name != "paligemma2":  # soft-capped: eager only
        with kernel(lvlm, "eager"), lh.steer(lvlm, [(layer, head)], REGION, strength):
            eager, _ = rows_and_written(lvlm)
        for one in eager:
            torch.testing.assert_close(eager[one], steered[one], **CLOSE)


def test_captured_rows_of_a_steered_model_equal_eager(lvlm: LVLM, image: Image.Image) -> None:
    """At every key."""
    copy = LVLM(deepcopy(lvlm.model), lvlm.processor, lvlm.spec, system=lvlm.system, conv_mode=lvlm.conv_mode)
    with lh.steer(copy, [(4, 4), (4, 5), (2, 1)], REGION, 3.0):
        inputs = copy.model_inputs([image], [copy.prompt("the dog")])
        with torch.inference_mode(), capture(copy.attention_modules) as recorder:
            copy.model(**inputs)
        with kernel(copy, "eager"), torch.inference_mode():
            attentions = copy.model(**inputs, output_attentions=True).attentions
    assert recorder.rows.keys() == copy.attention_modules.keys()
    for layer, rows in recorder.rows.items():
        torch.testing.assert_close(rows, attentions[layer][:, :, -1], **CLOSE)


def test_all_ways_to_ask_are_steered_alike(lvlm: LVLM, image: Image.Image) -> None:
    """Encoded before the block or in it, in a padded batch, and alone; after the block, all are as before."""
    encoded, expressions = lvlm.encode_image(image), ["the dog", "the small red car on the left"]

    def ways() -> list[np.ndarray]:
        return [
            *(maps.attention for maps in encoded.attend(expressions)[:1]),
            lvlm.ask(image, expressions)[0].attention,
            lvlm.attend_batch([image, image.copy()], expressions)[0].attention,
            lvlm.attend(image, "the dog").attention,
        ]

    plain = ways()[-1]
    with lh.steer(lvlm, [(3, 2), (4, 4)], REGION, 4.0):
        *others, steered = ways()
    for one in others:
        np.testing.assert_allclose(one, steered, **CLOSE)
    assert np.abs(steered - plain).max() > 1e-3
    for one in ways():
        np.testing.assert_allclose(one, plain, **CLOSE)


def sliding() -> LVLM:
    """A window of twelve tokens, which covers only the last of the image's 36."""
    model = llava_model(text="mistral", sliding_window=12)
    return LVLM(model, llava_processor(), ModelSpec("sliding"), system="", conv_mode="plain")


@pytest.mark.parametrize("kind", ["embedded", "sliding"])
def test_answers_are_steered_with_a_cache_as_without(lvlm: LVLM, image: Image.Image, kind: str) -> None:
    """Each step's logits equal those of a forward pass over the whole text so far."""
    asked = lvlm if kind == "embedded" else sliding()
    region = REGION if kind == "embedded" else (35, 0, 125, 90)
    heads = [(layer, head) for layer in range(1, asked.num_layers) for head in range(0, asked.num_heads, 2)]
    inputs = asked.model_inputs([image], [asked.prompt("the dog")])
    with torch.inference_mode():
        plain = asked.model(**inputs, use_cache=False).logits[0, -1]
    with lh.steer(asked, heads, region, 4.0), torch.inference_mode():
        inputs = asked.model_inputs([image], [asked.prompt("the dog")])
        made = asked.model.generate(
            **inputs,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = made.sequences[:, :-1]
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = asked.model(**whole, use_cache=False).logits[0]
    assert (made.logits[0][0] - plain).abs().max() > 1e-3
    for step, scores in enumerate(made.logits):
        expected = logits[inputs["input_ids"].shape[1] - 1 + step]
        torch.testing.assert_close(scores[0], expected, rtol=0, atol=1e-4)


def test_only_tokens_after_the_image_are_steered(lvlm: LVLM, image: Image.Image) -> None:
    """Up to the last image token, nothing changes; all later tokens change."""
    inputs = lvlm.model_inputs([image], [lvlm.prompt("the dog")])
    seen: list[torch.Tensor] = []
    hook = output_projection(lvlm, 4).register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    with torch.inference_mode():
        lvlm.model(**inputs)
        with lh.steer(lvlm, [(4, 4)], REGION, 3.0):  # a head that looks at the image
            lvlm.model(**lvlm.model_inputs([image], [lvlm.prompt("the dog")]))
    hook.remove()
    last = int((inputs["input_ids"][0] == lvlm.image_token_id).nonzero()[-1])
    change = (seen[1] - seen[0]).abs().amax(1)
    assert change[: last + 1].max() < 1e-5 < change[last + 1 :].min()


def test_strength_zero_and_errors_leave_the_model_unchanged(lvlm: LVLM, image: Image.Image) -> None:
    plain, registry = lvlm.attend(image, "the dog").attention, dict(AttentionInterface._global_mapping)
    for heads, strength in [([(4, 4)], 0), ([], 5.0)]:
        with lh.steer(lvlm, heads, REGION, strength):
            assert not lvlm.changes
            assert np.array_equal(lvlm.attend(image, "the dog").attention, plain)
    with pytest.raises(ZeroDivisionError), lh.steer(lvlm, [(4, 4)], REGION, 1.0):
        _ = 1 / 0
    assert not lvlm.changes
    assert dict(AttentionInterface._global_mapping) == registry


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((200, 0, 300, 50), "lies outside the image, which is 160 x 90"),
        ((10, 10, 5, 20), "with x1 > x0"),
        ((0, 0, float("nan"), 4), "with x1 > x0"),
        ((1, 2, 3), "four numbers"),
        ("here", "four numbers"),
    ],
)
def test_invalid_regions_are_refused(lvlm: LVLM, image: Image.Image, region: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught, lh.steer(lvlm, [(4, 4)], region, 1.0):
        lvlm.attend(image, "the dog")
    assert "\n" not in str(caught.value)
    assert not lvlm.changes


def test_unsupported_models_and_uses_are_refused(lvlm: LVLM, image: Image.Image) -> None:
    inputs = lvlm.model_inputs([image], [lvlm.prompt("the dog")])
    cropped = tiny("llava")  # CLIP's processor keeps the middle square
    unknown = LVLM(deepcopy(lvlm.model), lvlm.processor, lvlm.spec, system="", conv_mode="plain")
    unknown.model.config.get_text_config()._attn_implementation = "flash_attention_2"
    for model, head, region, strength, message in (
        (lvlm, (6, 0), REGION, 1.0, "there is no L6H0"),
        (lvlm, (4, 0), REGION, float("inf"), "finite number"),
        (cropped, (0, 0), (0, 0, 20, 90), 1.0, "does not see"),
        (unknown, (0, 0), REGION, 1.0, r"takes no bias .*=sdpa or eager"),
    ):
        with pytest.raises(UsageError, match=message), lh.steer(model, [head], region, strength):
            model.attend(image, "the dog")
    with pytest.raises(UsageError, match="before the block"), lh.steer(lvlm, [(4, 0)], REGION, 1.0):
        lvlm.model(**inputs)
    with lh.steer(lvlm, [(4, 0)], REGION, 1.0):
        lvlm.attend(image, "the dog")
        with pytest.raises(UsageError, match="open a block for each"):
            lvlm.attend(image.resize((90, 160)), "the dog")

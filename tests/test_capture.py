"""Captured rows equal eager attention in fp32, and an obvious second implementation."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny_models import llava_model, llava_processor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_utils import AttentionInterface

from localization_heads.lvlm.checkpoints.loading import load_model
from localization_heads.lvlm.forward import capture as forward_capture
from localization_heads.lvlm.forward.capture import Query, attention_modules, attention_rows, capture
from localization_heads.lvlm.forward.prefix import GrowingLayer, Prefix

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def inputs_of(image: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    processor = llava_processor()
    return dict(
        processor(images=[image] * len(texts), text=texts, return_tensors="pt", padding=True, padding_side="left")
    )


def eager_rows(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[layer, B, H, T] from `output_attentions`, the reference."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(**inputs, output_attentions=True).attentions
    return torch.stack(attentions)[:, :, :, -1]


def captured_rows(model: nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.inference_mode(), capture(attention_modules(model), **options) as recorder:
        model(**inputs)
    return torch.stack([recorder.rows[layer] for layer in sorted(recorder.rows)])


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "texts", [["<image> the red car ."], ["<image> the dog .", "<image> the left dog in this image ."]]
)
def test_capture_equals_eager(image: Any, kernel: str, texts: list[str]) -> None:
    """Also with grouped queries, and with left padding in a batch."""
    inputs = inputs_of(image, texts)
    rows = captured_rows(llava_model(attention=kernel), inputs)
    torch.testing.assert_close(rows, eager_rows(llava_model(), inputs), **TOLERANCE)


@pytest.mark.parametrize("text", ["mistral", "qwen2", "gemma2"])
def test_capture_equals_eager_in_other_language_models(image: Any, text: str) -> None:
    """A sliding window (mistral), biases (qwen2), soft-capped logits and another scaling (gemma2)."""
    options: dict[str, Any] = {"text": text}
    if text == "mistral":
        options["sliding_window"] = 8
    if text == "gemma2":
        options |= {
            "head_dim": 8, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 2.0, "sliding_window": 8,
        }  # fmt: skip
    kernel = "eager" if text == "gemma2" else "sdpa"
    inputs = inputs_of(image, ["<image> the red car ."])
    rows = captured_rows(llava_model(attention=kernel, **options), inputs)
    reference = eager_rows(llava_model(attention="eager", **options), inputs)
    torch.testing.assert_close(rows, reference, **TOLERANCE)


def test_embedded_model_equals_eager(image: Any) -> None:
    lvlm = load_model(device="cpu")
    maps = lvlm.attend(image, "the dog")
    inputs = lvlm.model_inputs([image], [maps.prompt])
    rows = eager_rows(lvlm.model, inputs)[:, 0]  # [layer, head, T]
    image_rows = rows[..., inputs["input_ids"][0] == lvlm.image_token_id]
    torch.testing.assert_close(torch.from_numpy(maps.attention).flatten(2), image_rows, **TOLERANCE)


def test_capture_does_not_change_the_model(image: Any) -> None:
    """Logits are bit-identical, and transformers' registry is restored."""
    model, inputs = llava_model(), inputs_of(image, ["<image> the red car ."])
    before = dict(AttentionInterface._global_mapping)
    with torch.inference_mode():
        plain = model(**inputs).logits
        with capture(attention_modules(model)):
            captured = model(**inputs).logits
    assert torch.equal(plain, captured)
    assert AttentionInterface._global_mapping == before


def test_generation_keeps_the_prefill(image: Any) -> None:
    """Decoding steps call the same modules again; only the first call is captured."""
    model, inputs = llava_model(), inputs_of(image, ["<image> the red car ."])
    with torch.inference_mode(), capture(attention_modules(model)) as recorder:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    rows = torch.stack([recorder.rows[layer] for layer in range(4)])
    torch.testing.assert_close(rows, eager_rows(model, inputs), **TOLERANCE)


def test_an_error_inside_restores_the_registry(image: Any) -> None:
    before = dict(AttentionInterface._global_mapping)
    with pytest.raises(ZeroDivisionError), capture({}):
        _ = 1 / 0
    assert AttentionInterface._global_mapping == before


def test_threads_have_separate_recorders(image: Any) -> None:
    """Two models at once: the rows are those of separate runs."""
    models = [llava_model(seed=seed) for seed in (1, 2)]
    inputs = inputs_of(image, ["<image> the red car ."])
    expected = [captured_rows(model, inputs) for model in models]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        barrier.wait()
        for _ in range(5):
            found[index].append(captured_rows(models[index], inputs))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert len(found[index]) == 5
        for rows in found[index]:
            torch.testing.assert_close(rows, expected[index], **TOLERANCE)


def naive_row(query: list[list[float]], key: list[list[float]], allowed: list[bool]) -> list[float]:
    """Softmax of the last query's scaled dot products over the allowed keys, in plain Python floats."""
    last, scale = query[-1], len(query[-1]) ** -0.5
    weights = [
        math.exp(scale * sum(a * b for a, b in zip(last, k, strict=True))) if ok else 0.0
        for k, ok in zip(key, allowed, strict=True)
    ]
    return [weight / sum(weights) for weight in weights]


def random_qk() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, 2, 5, 4, generator=generator), torch.randn(1, 1, 5, 4, generator=generator)


@pytest.mark.parametrize(
    ("mask", "options", "allowed"),
    [
        (None, {}, [True] * 5),
        (None, {"sliding_window": 2}, [False, False, False, True, True]),
        (torch.tensor([[False, True, True, True, True]]), {}, [False, True, True, True, True]),
        (
            torch.tensor([True, False, True, True, True]).expand(1, 1, 5, 5),
            {},
            [True, False, True, True, True],
        ),
        (
            torch.tensor([0.0, torch.finfo(torch.float32).min, 0.0, 0.0, 0.0]).expand(1, 1, 5, 5),
            {},
            [True, False, True, True, True],
        ),
    ],
    ids=["causal", "window", "padding (flash)", "boolean (sdpa)", "additive (eager)"],
)
def test_row_by_hand(mask: torch.Tensor | None, options: dict[str, Any], allowed: list[bool]) -> None:
    query, key = random_qk()
    row = attention_rows(nn.Module(), query, key, mask, **options)[:, :, 0]
    expected = [naive_row(query[0, head].tolist(), key[0, 0].tolist(), allowed) for head in range(2)]
    torch.testing.assert_close(row[0], torch.tensor(expected))


@pytest.mark.parametrize("at_once", [2, 3, 4])
def test_rows_do_not_depend_on_the_number_of_heads_converted_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: four KV heads with two query heads each."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, 5, 4, generator=generator).bfloat16()
    key = torch.randn(2, 4, 5, 4, generator=generator).bfloat16()
    one_by_one = attention_rows(nn.Module(), query, key, None)
    monkeypatch.setattr(forward_capture, "_kv_heads_at_once", lambda key: at_once)
    torch.testing.assert_close(attention_rows(nn.Module(), query, key, None), one_by_one)


def test_fp32_keys_on_a_gpu_are_bounded() -> None:
    keys = torch.empty(2, 32, 600, 128, device="meta")
    assert 4 * keys[:, : forward_capture._kv_heads_at_once(keys)].numel() >= 4 * keys.numel()
    many = torch.empty(256, 32, 600, 128, device="meta")
    heads = forward_capture._kv_heads_at_once(many)
    assert 1 <= heads < 32
    assert 4 * many[:, :heads].numel() <= forward_capture.MAX_FP32_KEY_BYTES
    assert forward_capture._kv_heads_at_once(torch.empty(1, 32, 600, 128)) == 1


def test_row_into_an_empty_static_cache() -> None:
    """Five queries against a cache of eight: the last three keys are not filled yet."""
    query, key = random_qk()
    longer = torch.cat([key, torch.full((1, 1, 3, 4), 9.0)], 2)
    row = attention_rows(nn.Module(), query, longer, None)[:, :, 0]
    assert (row[..., 5:] == 0).all()
    torch.testing.assert_close(row[..., :5], attention_rows(nn.Module(), query, key, None)[:, :, 0])


@pytest.mark.parametrize("options", [{}, {"sliding_window": 2}], ids=["causal", "window"])
def test_rows_after_a_prefix(options: dict[str, Any]) -> None:
    """Two of five tokens continue a cached prefix, without a mask (flash): the rows do not change."""
    query, key = random_qk()
    whole = attention_rows(nn.Module(), query, key, None, positions=torch.tensor([[3, 4]]), **options)
    positions = torch.tensor([[0, 1]])
    later = attention_rows(nn.Module(), query[:, :, 3:], key, None, positions=positions, past=3, **options)
    torch.testing.assert_close(later, whole)


def test_row_with_a_sink_and_a_softcap() -> None:
    query, key = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4)
    with_sink = attention_rows(nn.Module(), query, key, None, s_aux=torch.zeros(1))[:, :, 0]
    torch.testing.assert_close(with_sink, torch.full((1, 1, 3), 0.25))  # the sink counts as a fourth key
    sinks = torch.tensor([9.0, math.log(2)]).reshape(1, 1, 2, 1)  # per query; the last one sees two keys
    of_queries = attention_rows(nn.Module(), query.expand(-1, -1, 2, -1), key, None, sinks=sinks)
    torch.testing.assert_close(of_queries[0, 0, 0], torch.tensor([0.25, 0.25, 0.0]))
    query[..., 0], key[..., 1, 0] = 100.0, 100.0
    capped = attention_rows(nn.Module(), query, key, None, softcap=1.0)[:, :, 0]  # logits 0, 1, 0
    torch.testing.assert_close(capped[0, 0, 1], torch.tensor(math.e / (math.e + 2)))


# ----------------------------------------------------------------------------------------------- several devices


def move_to(part: nn.Module, device: str) -> None:
    """Give a module uninitialised weights on a device, and have accelerate move its inputs there."""
    for module in part.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)  # type: ignore[assignment]
    add_hook_to_module(part, AlignDevicesHook(device, skip_keys=["past_key_values"]))


def test_each_layer_is_captured_on_its_own_device() -> None:
    """As with `device_map`: layers 0 and 1 on one fake device, 2 and 3 on another; torch refuses to mix them.

    Rows, shared prefix and answer rows of each layer are on its device, wherever query positions and masks come from.
    """
    model = llava_model()
    decoder, modules = model.get_decoder(), attention_modules(model)
    places = {layer: f"cpu:{layer // 2}" for layer in modules}
    text = decoder.config
    width, heads, shared = text.hidden_size, text.num_attention_heads, text.num_key_value_heads

    def run(count: int, length: int, **options: Any) -> None:
        decoder(inputs_embeds=torch.zeros(count, length, width, device="cpu:0"), **options)

    def devices(rows: dict[int, Any]) -> dict[int, str]:
        return {layer: str(row.device) for layer, row in rows.items()}

    with FakeTensorMode(), torch.no_grad():
        move_to(decoder.rotary_emb, "cpu:0")
        move_to(decoder.norm, "cpu:1")
        for layer, device in places.items():
            move_to(decoder.layers[layer], device)
        weighted = Query(torch.tensor([[3, 4], [5, 5]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        for query in (Query(), weighted):
            with capture(modules, query=query) as recorder:
                run(2, 9, use_cache=False)
            assert devices(recorder.rows) == places
            assert {tuple(row.cpu().shape) for row in recorder.rows.values()} == {(2, heads, 9)}
        kept = [torch.zeros(1, shared, 9, width // heads, device=at) for at in places.values()]
        prefix = Prefix(list(range(9)), [GrowingLayer(one, one) for one in kept], 3, can_be_cut=True)
        with capture(modules, query=weighted._replace(positions=torch.tensor([[1, 2], [2, 2]]), past=7)) as recorder:
            run(2, 3, past_key_values=prefix.cache(2, 7), use_cache=True)
        assert devices(recorder.rows) == places
        with capture(modules, query=Query(past=7, answer_tokens=2), num_tokens=10) as recorder:
            cache = prefix.cache(2, 7, grows=True)
            run(2, 3, past_key_values=cache, use_cache=True)
            for _ in range(2):
                recorder.unfinished = torch.ones(2, dtype=torch.bool, device="cpu:1")  # where the logits are
                recorder.token_mask = torch.ones(2, 2, dtype=torch.bool)
                run(2, 1, past_key_values=cache, use_cache=True)
        assert devices({layer: mean for layer, (mean, _) in recorder.answer_means.items()}) == places

"""(b) Capture against eager attention with `output_attentions`, and against the published code's procedure."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.capture import capture_rows, memory_row
from benchmarks.floor import capture_work
from benchmarks.memory import peak_bytes
from benchmarks.models import EXPRESSIONS, eager
from benchmarks.result import Row, timed_row
from benchmarks.setting import Setting
from localization_heads.lvlm.model import LVLM

KEY = "b"
ANSWER_TOKENS = 10
"""Tokens that the published code generates before it reads the maps."""


def rows(setting: Setting) -> list[Row]:
    shape = setting.shape()
    lvlm = setting.lvlm(shape)
    inputs = lvlm.model_inputs([setting.image], [lvlm.prompt(EXPRESSIONS[0])])
    work = capture_work(shape, inputs["input_ids"].shape[1], width=setting.machine.width)
    variants = {
        "ours": lambda: capture_rows(lvlm, inputs),
        "eager": lambda: output_attentions(lvlm, inputs),
        "published": lambda: published_method(lvlm, inputs),
    }
    timings = setting.time(variants)
    peaks = {name: peak_bytes(variant) for name, variant in variants.items()}
    table = []
    for other, what in (
        ("eager", "capture / eager with output_attentions"),
        ("published", f"capture / the published way: eager, all maps to the host, {ANSWER_TOKENS} tokens"),
    ):
        options: dict[str, Any] = {"work": work, "machine": setting.machine} if other == "eager" else {}
        table.append(timed_row(KEY, f"{what}, {shape}: time", timings, "ours", other, **options))
        table.append(memory_row(KEY, "the same: peak memory over the weights", peaks["ours"], peaks[other]))
    return table


def output_attentions(lvlm: LVLM, inputs: dict[str, Any]) -> torch.Tensor:
    """(layer, B, H, T) on the host: the last row of each attention matrix that transformers returns."""
    with torch.inference_mode(), eager(lvlm):
        output = lvlm.model.base_model(**inputs, use_cache=False, output_attentions=True)
        return torch.stack([layer[:, :, -1] for layer in output.attentions]).float().cpu()


def published_method(lvlm: LVLM, inputs: dict[str, Any]) -> list[list[torch.Tensor]]:
    """Generate an answer and copy every layer's full attention matrix to the host at every step."""
    options: dict[str, Any] = {
        "max_new_tokens": ANSWER_TOKENS,
        "min_new_tokens": ANSWER_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
    }
    with torch.inference_mode(), eager(lvlm):
        output = lvlm.model.generate(**inputs, **options, output_attentions=True, return_dict_in_generate=True)
        return [[layer.detach().clone().cpu() for layer in step] for step in output.attentions]

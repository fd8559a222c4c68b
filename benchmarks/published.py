"""(b) Against eager attention with `output_attentions`, and against what the published code does for an expression."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.capture import memory_row, ours
from benchmarks.floor import capture as least_work
from benchmarks.memory import peak_bytes
from benchmarks.models import EXPRESSIONS, eager
from benchmarks.result import Row, timed_row
from benchmarks.setting import Setting
from localization_heads.lvlm.model import LVLM

KEY = "b"
ANSWER = 10
"""Tokens that the published code generates before it looks at the maps."""


def rows(setting: Setting) -> list[Row]:
    shape = setting.shape()
    lvlm = setting.lvlm(shape)
    inputs = lvlm.model_inputs([setting.image], [lvlm.prompt(EXPRESSIONS[0])])
    work = least_work(shape, inputs["input_ids"].shape[1], width=setting.machine.width)
    ways = {
        "ours": lambda: ours(lvlm, inputs),
        "eager": lambda: output_attentions(lvlm, inputs),
        "published": lambda: published(lvlm, inputs),
    }
    timings = setting.time(ways)
    peaks = {name: peak_bytes(way) for name, way in ways.items()}
    found = []
    for other, what in (
        ("eager", "capture / eager with output_attentions"),
        ("published", f"capture / the published way: eager, all maps to the host, {ANSWER} tokens"),
    ):
        options: dict[str, Any] = {"work": work, "machine": setting.machine} if other == "eager" else {}
        found.append(timed_row(KEY, f"{what}, {shape}: time", timings, "ours", other, **options))
        found.append(memory_row(KEY, "the same: peak memory over the weights", peaks["ours"], peaks[other]))
    return found


def output_attentions(lvlm: LVLM, inputs: dict[str, Any]) -> torch.Tensor:
    """(layer, B, H, T) on the host: the last rows of the maps that transformers hands out."""
    with torch.inference_mode(), eager(lvlm):
        found = lvlm.model.base_model(**inputs, use_cache=False, output_attentions=True)
        return torch.stack([layer[:, :, -1] for layer in found.attentions]).float().cpu()


def published(lvlm: LVLM, inputs: dict[str, Any]) -> list[list[torch.Tensor]]:
    """Per step and layer a clone of the whole map on the host, and an answer that nobody reads."""
    ten: dict[str, Any] = {
        "max_new_tokens": ANSWER,
        "min_new_tokens": ANSWER,
        "do_sample": False,
        "pad_token_id": 0,
    }
    with torch.inference_mode(), eager(lvlm):
        found = lvlm.model.generate(**inputs, **ten, output_attentions=True, return_dict_in_generate=True)
        return [[layer.detach().clone().cpu() for layer in step] for step in found.attentions]

"""(a) Capturing every head's attention row, against a plain prefill of the same model on the same inputs."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.floor import capture_work
from benchmarks.memory import peak_bytes
from benchmarks.models import EXPRESSIONS
from benchmarks.result import Row, bytes_text, timed_row
from benchmarks.setting import Setting
from localization_heads.lvlm.forward.capture import Query
from localization_heads.lvlm.model import LVLM

KEY = "a"


def rows(setting: Setting) -> list[Row]:
    shape = setting.shape()
    lvlm = setting.lvlm(shape)
    inputs = lvlm.model_inputs([setting.image], [lvlm.prompt(EXPRESSIONS[0])])
    tokens = inputs["input_ids"].shape[1]
    variants = {"capture": lambda: capture_rows(lvlm, inputs), "prefill": lambda: prefill(lvlm, inputs)}
    timings = setting.time(variants)
    time = timed_row(
        KEY,
        f"capture / plain sdpa prefill, {tokens} tokens, {shape}: time",
        timings,
        "capture",
        "prefill",
        goal=1.05,
        work=capture_work(shape, tokens, width=setting.machine.width),
        machine=setting.machine,
    )
    return [
        time,
        memory_row(KEY, "the same: peak memory over the weights", *map(peak_bytes, variants.values()), goal=1.1),
    ]


def capture_rows(lvlm: LVLM, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The forward pass of `attend`, without its processor and without cutting the rows into maps."""
    return lvlm.capture_rows(inputs, Query(), None)


def prefill(lvlm: LVLM, inputs: dict[str, Any]) -> Any:
    """A forward pass without KV cache and LM head: the cheapest run through all layers."""
    with torch.inference_mode():
        return lvlm.model.base_model(**inputs, use_cache=False)


def memory_row(key: str, what: str, ours: int | None, other: int | None, *, goal: float | None = None) -> Row:
    if not ours or not other:
        return Row(key, what, note="not measured on this system")
    return Row(key, what, bytes_text(ours), bytes_text(other), ours / other, goal=goal)

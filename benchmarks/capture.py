"""(a) Every head's row, against the plain prefill that everybody runs anyway: the same model, the same inputs."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.floor import capture as least_work
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
    ways = {"capture": lambda: ours(lvlm, inputs), "prefill": lambda: prefill(lvlm, inputs)}
    timings = setting.time(ways)
    time = timed_row(
        KEY,
        f"capture / plain sdpa prefill, {tokens} tokens, {shape}: time",
        timings,
        "capture",
        "prefill",
        goal=1.05,
        work=least_work(shape, tokens, width=setting.machine.width),
        machine=setting.machine,
    )
    return [
        time,
        memory_row(KEY, "the same: peak memory over the weights", *map(peak_bytes, ways.values()), goal=1.1),
    ]


def ours(lvlm: LVLM, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """What `attend` does between the processor and the maps."""
    return lvlm.capture_rows(inputs, Query(), None)


def prefill(lvlm: LVLM, inputs: dict[str, Any]) -> Any:
    """No cache, no LM head: the cheapest way to run all layers."""
    with torch.inference_mode():
        return lvlm.model.base_model(**inputs, use_cache=False)


def memory_row(key: str, what: str, here: int | None, there: int | None, *, goal: float | None = None) -> Row:
    if not here or not there:
        return Row(key, what, note="not measured on this system")
    return Row(key, what, bytes_text(here), bytes_text(there), here / there, goal=goal)

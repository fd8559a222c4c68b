"""(d) Grounding with heads that are known: the layers above the deepest of them are not run."""

from __future__ import annotations

from benchmarks.floor import Shape
from benchmarks.floor import capture as least_work
from benchmarks.models import EXPRESSIONS
from benchmarks.result import Row, timed_row
from benchmarks.setting import Setting

KEY = "d"
HEADS_IN = 14
"""The layer of LLaVA-1.5-7B's three heads, counted from 0."""


def rows(setting: Setting) -> list[Row]:
    shape = setting.shape(None if setting.quick else Shape().layers)
    last = HEADS_IN * shape.layers // Shape().layers
    lvlm, image, expression = setting.lvlm(shape), setting.image, EXPRESSIONS[0]
    tokens = lvlm.encode([image], [lvlm.prompt(expression)])["input_ids"].shape[1]
    ways = {
        "early": lambda: lvlm.attend(image, expression, last_layer=last),
        "full": lambda: lvlm.attend(image, expression),
    }
    repeated = "" if setting.on_gpu else "layers share weights to fit"
    return [
        timed_row(
            KEY,
            f"heads in layer {last} of {shape.layers}: stop there / run all",
            setting.time(ways),
            "early",
            "full",
            goal=0.5,
            work=least_work(shape, tokens, last, setting.machine.width),
            machine=setting.machine,
            note=repeated,
        )
    ]

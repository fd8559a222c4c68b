"""(d) Grounding with heads that are known: the layers above the deepest of them are not run."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.floor import Shape
from benchmarks.floor import capture as least_work
from benchmarks.models import EXPRESSIONS
from benchmarks.result import Row, timed_row
from benchmarks.setting import Setting
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.head import Head
from localization_heads.lvlm.model import LVLM

KEY = "d"
HEADS_IN = 14
"""The layer of LLaVA-1.5-7B's three heads, counted from 0."""


def rows(setting: Setting) -> list[Row]:
    """Everything from image and expression to the box, against the prefill that any answer begins with."""
    shape = setting.shape(None if setting.quick else Shape().layers)
    last = HEADS_IN * shape.layers // Shape().layers
    lvlm, image = setting.lvlm(shape), setting.image
    tokens = encoded(lvlm, image)["input_ids"].shape[1]
    ways = {
        "early": lambda: ground(lvlm, image, last, last_layer=last),
        "whole": lambda: whole_prefill(lvlm, image),
        "all": lambda: ground(lvlm, image, last, last_layer=None),
    }
    timings = setting.time(ways)
    what = f"grounding with heads in layer {last} of {shape}, image to box"
    note = "" if setting.on_gpu or setting.quick else "layers share the weights of four, to fit"
    work = least_work(shape, tokens, last, setting.machine.width)
    shown: dict[str, Any] = {"work": work, "machine": setting.machine, "note": note}
    return [
        timed_row(
            KEY,
            f"{what} / plain prefill, LM head of its last token",
            timings,
            "early",
            "whole",
            goal=0.5,
            **shown,
        ),
        timed_row(KEY, f"{what} / the same from the rows of all layers, no LM head", timings, "early", "all"),
    ]


def ground(lvlm: LVLM, image: Any, layer: int, *, last_layer: int | None) -> Grounding:
    """By three heads of that layer; `last_layer` None runs the others too."""
    maps = lvlm.attend(image, EXPRESSIONS[0], last_layer=last_layer)
    return ground_maps(maps, [Head(layer, number) for number in range(3)])


def whole_prefill(lvlm: LVLM, image: Any) -> Any:
    """All layers to their ends and the logits of one token, as generation computes them before its first token."""
    with torch.inference_mode():
        return lvlm.model(**encoded(lvlm, image), use_cache=False, logits_to_keep=1)


def encoded(lvlm: LVLM, image: Any) -> dict[str, Any]:
    return lvlm.model_inputs([image], [lvlm.prompt(EXPRESSIONS[0])])

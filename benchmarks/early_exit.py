"""(d) Grounding with known heads: the layers above the deepest one are skipped."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.floor import Shape, capture_work
from benchmarks.models import EXPRESSIONS
from benchmarks.result import Row, timed_row
from benchmarks.setting import Setting
from localization_heads.grounding.ground import Grounding, ground_maps
from localization_heads.heads.head import Head
from localization_heads.lvlm.model import LVLM

KEY = "d"
HEADS_LAYER = 14
"""Layer of LLaVA-1.5-7B's three localization heads, counted from 0."""


def rows(setting: Setting) -> list[Row]:
    """Grounding from image and expression to box, against the prefill that any generated answer begins with."""
    shape = setting.shape(None if setting.quick else Shape().layers)
    last = HEADS_LAYER * shape.layers // Shape().layers
    lvlm, image = setting.lvlm(shape), setting.image
    tokens = model_inputs(lvlm, image)["input_ids"].shape[1]
    variants = {
        "early": lambda: ground(lvlm, image, last, last_layer=last),
        "whole": lambda: whole_prefill(lvlm, image),
        "all": lambda: ground(lvlm, image, last, last_layer=None),
    }
    timings = setting.time(variants)
    what = f"grounding with heads in layer {last} of {shape}, image to box"
    note = "" if setting.on_gpu or setting.quick else "layers share the weights of four, to fit"
    work = capture_work(shape, tokens, last, setting.machine.width)
    options: dict[str, Any] = {"work": work, "machine": setting.machine, "note": note}
    return [
        timed_row(
            KEY,
            f"{what} / plain prefill, LM head of its last token",
            timings,
            "early",
            "whole",
            goal=0.5,
            **options,
        ),
        timed_row(KEY, f"{what} / the same from the rows of all layers, no LM head", timings, "early", "all"),
    ]


def ground(lvlm: LVLM, image: Any, layer: int, *, last_layer: int | None) -> Grounding:
    """Ground with three heads of `layer`; `last_layer=None` also runs the layers above it."""
    maps = lvlm.attend(image, EXPRESSIONS[0], last_layer=last_layer)
    return ground_maps(maps, [Head(layer, number) for number in range(3)])


def whole_prefill(lvlm: LVLM, image: Any) -> Any:
    """A prefill through all layers, with the logits of the last token: what generation does before its first token."""
    with torch.inference_mode():
        return lvlm.model(**model_inputs(lvlm, image), use_cache=False, logits_to_keep=1)


def model_inputs(lvlm: LVLM, image: Any) -> dict[str, Any]:
    return lvlm.model_inputs([image], [lvlm.prompt(EXPRESSIONS[0])])

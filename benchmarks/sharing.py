"""(c) Seven expressions of one image, as RefCOCO asks: the image encoded once, or anew for each."""

from __future__ import annotations

import numpy as np

from benchmarks.floor import shared_capture
from benchmarks.models import EXPRESSIONS
from benchmarks.result import Row, timed_row
from benchmarks.setting import Setting
from localization_heads.attention import AttentionMaps
from localization_heads.lvlm.model import LVLM

KEY = "c"


def rows(setting: Setting) -> list[Row]:
    shape = setting.shape()
    lvlm, image = setting.lvlm(shape), setting.image
    ways = {
        "shared": lambda: lvlm.encode_image(image).attend(EXPRESSIONS),
        "apart": lambda: [lvlm.attend(image, expression) for expression in EXPRESSIONS],
    }
    check(ways["shared"](), ways["apart"](), tolerance=0.05 if setting.machine.width == 2 else 1e-5)
    prefix, ends = token_counts(lvlm, image)
    return [
        timed_row(
            KEY,
            f"{len(EXPRESSIONS)} expressions of one image: encoded once / each anew, {shape}",
            setting.time(ways),
            "shared",
            "apart",
            goal=0.2,
            work=shared_capture(shape, prefix, ends, setting.machine.width),
            machine=setting.machine,
        )
    ]


def check(one: list[AttentionMaps], two: list[AttentionMaps], tolerance: float) -> None:
    """Speed of a wrong answer is worth nothing. The tolerance is relative to the largest weight."""
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a.attention, b.attention, rtol=0, atol=tolerance * b.attention.max())


def token_counts(lvlm: LVLM, image: object) -> tuple[int, list[int]]:
    """Tokens that all prompts begin with, and how many each has besides."""
    prompts = [
        lvlm.model_inputs([image], [lvlm.prompt(text)])["input_ids"][0].tolist() for text in EXPRESSIONS
    ]  # type: ignore[list-item]
    common = next(i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
    return common, [len(prompt) - common for prompt in prompts]

"""(c) Seven expressions about one image, as in RefCOCO: the image encoded once, or again for each expression."""

from __future__ import annotations

import numpy as np

from benchmarks.floor import shared_capture_work
from benchmarks.models import EXPRESSIONS
from benchmarks.result import Row, timed_row
from benchmarks.setting import Setting
from localization_heads.attention import AttentionMaps
from localization_heads.lvlm.model import LVLM

KEY = "c"


def rows(setting: Setting) -> list[Row]:
    shape = setting.shape()
    lvlm, image = setting.lvlm(shape), setting.image
    variants = {
        "shared": lambda: lvlm.encode_image(image).attend(EXPRESSIONS),
        "apart": lambda: [lvlm.attend(image, expression) for expression in EXPRESSIONS],
    }
    assert_maps_agree(variants["shared"](), variants["apart"](), tolerance=0.05 if setting.machine.width == 2 else 1e-5)
    prefix, suffixes = token_counts(lvlm, image)
    return [
        timed_row(
            KEY,
            f"{len(EXPRESSIONS)} expressions of one image: encoded once / each anew, {shape}",
            setting.time(variants),
            "shared",
            "apart",
            goal=0.2,
            work=shared_capture_work(shape, prefix, suffixes, setting.machine.width),
            machine=setting.machine,
        )
    ]


def assert_maps_agree(shared: list[AttentionMaps], apart: list[AttentionMaps], tolerance: float) -> None:
    """Raise AssertionError if both variants do not compute the same; `tolerance` is relative to the largest weight."""
    for ours, expected in zip(shared, apart, strict=True):
        atol = tolerance * expected.attention.max()
        np.testing.assert_allclose(ours.attention, expected.attention, rtol=0, atol=atol)


def token_counts(lvlm: LVLM, image: object) -> tuple[int, list[int]]:
    """The length of the prefix that all prompts share, and the length of each prompt's remainder."""
    prompts = [lvlm.model_inputs([image], [lvlm.prompt(text)])["input_ids"][0].tolist() for text in EXPRESSIONS]  # type: ignore[list-item]
    prefix = next(i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
    return prefix, [len(prompt) - prefix for prompt in prompts]

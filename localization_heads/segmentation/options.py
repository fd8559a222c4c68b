"""Which segmenter, and what it is told: the options of `segmenter=`, and the object they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from localization_heads.segmentation.refine import Segmenter

Kind = Literal["none", "grabcut", "sam", "sam2", "sam3"]
Prompt = Literal["box", "points", "map"]


@dataclass(frozen=True)
class SegmenterOptions:
    """What makes the masks.

    Args:
        kind: `"none"` (the pseudo-mask), `"grabcut"`, or a family of SAMs.
        name: Hugging Face id or local folder of a SAM of that family.
        prompt: what a SAM is told: any of `"box"`, `"points"` and `"map"`, at least one.
        num_points: interior points, at most.
        multimask: let a SAM make three masks and take the one it thinks best; else it makes one.
        device: where a SAM runs, as `pick_device` takes it.
        iterations: of GrabCut.

    Raises:
        ValueError: for a value outside these, naming the option.
    """

    kind: Kind = "grabcut"
    name: str = ""
    prompt: tuple[Prompt, ...] = ("box",)
    num_points: int = 3
    multimask: bool = False
    device: str | int | None = None
    iterations: int = 5

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if not self.prompt or set(self.prompt) - set(get_args(Prompt)):
            raise ValueError(f"prompt must name some of {', '.join(get_args(Prompt))}, not {self.prompt!r}")
        for name in ("num_points", "iterations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")

    @classmethod
    def of(cls, options: Mapping[str, Any], device: str | int | None) -> SegmenterOptions:
        """From the values of `config/segmenter/`; `device` is used where they name none."""
        values: dict[str, Any] = dict(options)
        if "prompt" in values:
            values["prompt"] = tuple(values["prompt"])
        if values.get("device") is None:
            values["device"] = device
        return cls(**values)


GRABCUT = SegmenterOptions()
"""The default: offline, without weights."""


def make_segmenter(options: SegmenterOptions) -> Segmenter | None:
    """The segmenter, its weights loaded; None for `kind="none"`.

    Raises:
        UsageError: an extra is missing, or there is no such model.
        WorkError: the weights cannot be had or read.
    """
    if options.kind == "none":
        return None
    if options.kind == "grabcut":
        from localization_heads.segmentation.grabcut import GrabCut

        return GrabCut(options.iterations)
    from localization_heads.segmentation.sam import load_sam

    return load_sam(options)

"""What all benchmarks of one run share: the machine, the image, the timing, and one model in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from PIL import Image

from benchmarks.floor import Shape
from benchmarks.machine import Machine
from benchmarks.models import QUICK, random_llava, sample_image
from benchmarks.result import PROBE
from benchmarks.timing import Timings, time_settled
from localization_heads.lvlm.model import LVLM

CPU_LAYERS = 4
"""Decoder layers (of 32) that are run without a GPU; deeper models repeat the weights of these."""


@dataclass
class Setting:
    """
    Args:
        rounds: the most rounds of a comparison.
        max_seconds: a comparison begins no further round after this time.
        layers: decoder layers; None for all of them on a GPU, and `CPU_LAYERS` elsewhere.
        quick: run everything at toy size, as a smoke test.
    """

    machine: Machine
    rounds: int
    layers: int | None = None
    quick: bool = False
    max_seconds: float | None = None
    _loaded: dict[Shape, LVLM] = field(default_factory=dict, repr=False)

    @cached_property
    def image(self) -> Image.Image:
        return sample_image()

    def time(self, variants: Mapping[str, Callable[[], Any]]) -> Timings:
        """Time the variants and the machine's probe in the same rounds."""
        return time_settled({**variants, PROBE: self.machine.probe}, self.rounds, max_seconds=self.max_seconds)

    @property
    def on_gpu(self) -> bool:
        return self.machine.device.type == "cuda"

    def shape(self, layers: int | None = None) -> Shape:
        """LLaVA-1.5-7B's shape with `layers` layers (default: the run's), narrowed until it fits into memory."""
        full = QUICK if self.quick else Shape()
        default = full.layers if self.quick or self.on_gpu else CPU_LAYERS
        shape = replace(full, layers=layers or self.layers or default)
        memory, width = self.machine.memory, self.machine.width
        return shape if memory is None else shape.fitting(memory, self._distinct_layers(shape), width)

    def _distinct_layers(self, shape: Shape) -> int:
        """How many layers have weights of their own."""
        return shape.layers if self.on_gpu else min(shape.layers, CPU_LAYERS)

    def lvlm(self, shape: Shape) -> LVLM:
        """The random model of this shape; loading another shape drops it, so that memory holds one model at a time."""
        if shape not in self._loaded:
            self._loaded.clear()
            machine, distinct = self.machine, self._distinct_layers(shape)
            self._loaded[shape] = random_llava(shape, machine.device, machine.dtype, distinct=distinct)
        return self._loaded[shape]

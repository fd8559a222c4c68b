"""What all benchmarks of one run share."""

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
from benchmarks.timing import Timings, settled
from localization_heads.lvlm.model import LVLM

SMALL_MACHINE = 4
"""Layers (of 32) that a machine without a GPU runs, and that have weights of their own."""


@dataclass
class Setting:
    """
    Args:
        rounds: how often every way is timed, at most.
        at_most: seconds after which a comparison begins no further round.
        layers: of the language model; None for all of them on a GPU, and for a few elsewhere.
        quick: everything at toy size, to see that it runs.
    """

    machine: Machine
    rounds: int
    layers: int | None = None
    quick: bool = False
    at_most: float | None = None
    _loaded: dict[Shape, LVLM] = field(default_factory=dict, repr=False)

    @cached_property
    def image(self) -> Image.Image:
        return sample_image()

    def time(self, ways: Mapping[str, Callable[[], Any]]) -> Timings:
        """Time the ways, and the machine itself, in the same rounds."""
        return settled({**ways, PROBE: self.machine.probe}, self.rounds, at_most=self.at_most)

    @property
    def on_gpu(self) -> bool:
        return self.machine.device.type == "cuda"

    def shape(self, layers: int | None = None) -> Shape:
        """LLaVA-1.5-7B's with as many layers as this run has, or with `layers` of them.

        Narrower where the memory is small.
        """
        full = QUICK if self.quick else Shape()
        few = full.layers if self.quick or self.on_gpu else SMALL_MACHINE
        shape = replace(full, layers=layers or self.layers or few)
        room, width = self.machine.memory, self.machine.width
        return shape if room is None else shape.fitting(room, self._distinct(shape), width)

    def _distinct(self, shape: Shape) -> int:
        """Layers with weights of their own."""
        return shape.layers if self.on_gpu else min(shape.layers, SMALL_MACHINE)

    def lvlm(self, shape: Shape) -> LVLM:
        """One model at a time is in memory."""
        if shape not in self._loaded:
            self._loaded.clear()
            machine, distinct = self.machine, self._distinct(shape)
            self._loaded[shape] = random_llava(shape, machine.device, machine.dtype, distinct=distinct)
        return self._loaded[shape]

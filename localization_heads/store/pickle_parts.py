"""What a pickle may build, and how much of it: an account of instructions and bytes, arrays under construction, and the
plain value that comes out.

An array or tensor is described by its bytes, type, shape and strides; they are checked before any array is made.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from localization_heads.errors import shown

MAX_ELEMENTS = 1 << 30
MAX_DIMENSIONS = 8
REFERENCE_BYTES = 8
"""Bytes of a reference: in a list, on the stack or in the memo."""

_BFLOAT16 = "bf2"
_STORAGE_DTYPES = {
    "HalfStorage": "<f2",
    "BFloat16Storage": _BFLOAT16,
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "BoolStorage": "|b1",
    "ByteStorage": "|u1",
    "CharStorage": "|i1",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
}


class PickleRefusedError(Exception):
    """The pickle is broken or asks for something outside the allow-list."""


@dataclass(frozen=True)
class Limits:
    """Limits for a pickle: number of instructions, and nesting of its values.

    Args:
        kind: the kind of file expected, for messages.
    """

    instructions: int = 1_000_000  # an analysis of 10,000 heads takes 250,000
    depth: int = 16
    kind: str = "an attention file"


class Budget:
    """The account of a file of `size` bytes: the instructions and built bytes that are left."""

    def __init__(self, size: int, limits: Limits) -> None:
        self.bytes = 7 * size + (56 << 20)  # RefCOCO's refs, nearly all short texts, take 7 times their size
        self.instructions = limits.instructions
        self.kind = limits.kind

    def charge(self, count: int) -> None:
        """Charge `count` bytes before, or as, they are allocated."""
        self.bytes -= count
        if self.bytes < 0:
            raise PickleRefusedError(
                f"refused: it would build far more bytes than the file holds, which {self.kind} never does"
            )

    def step(self) -> None:
        self.instructions -= 1
        if self.instructions < 0:
            raise PickleRefusedError(f"refused: far more instructions than {self.kind} needs")


def storage_dtype(module: object, name: object) -> str | None:
    """The number type that a storage class of torch stands for, or None.

    >>> storage_dtype("torch", "HalfStorage")
    '<f2'
    """
    if module not in ("torch", "torch.cuda") or type(name) is not str:
        return None
    return _STORAGE_DTYPES.get(name)


class DtypeBuilder:
    """A number type under construction: the code (`f4`), then its byte order. Objects, text and records are refused."""

    def __init__(self, code: object) -> None:
        if type(code) is not str or not re.fullmatch(r"[<>|=]?(f[248]|[iu][1248]|b1)", code):
            raise PickleRefusedError(f"refused: arrays of type {shown(code)} are not taken")
        self.code = code

    def set_state(self, state: object) -> None:
        """The tuple `(3, byte order, None, None, None, -1, -1, 0)` that numpy writes."""
        if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise PickleRefusedError("refused: an unknown form of number type")
        if state[2:5] != (None, None, None):
            raise PickleRefusedError("refused: arrays of records are not taken")
        self.code = state[1] + self.code.lstrip("<>|=")


def dtype_code(kind: object) -> str:
    """The code of a number type that a pickle made. A mere text, which could say bfloat16, is none."""
    if type(kind) is not DtypeBuilder:
        raise PickleRefusedError("refused: an array of an unknown type")
    return kind.code


class ArrayBuilder:
    """An array under construction: bytes, type and shape. `array()` is a read-only view of the bytes."""

    __slots__ = ("_array",)

    def __init__(self) -> None:
        self._array: np.ndarray | None = None

    def __sizeof__(self) -> int:
        """With the views of the bytes, and without the bytes."""
        return 300

    def set_state(self, state: object) -> None:
        """The tuple `(version, shape, dtype, is_fortran, bytes)` that numpy writes."""
        if type(state) is not tuple or len(state) != 5:
            raise PickleRefusedError("refused: an unknown form of array")
        _, shape, kind, fortran, content = state
        self.fill(content, dtype_code(kind), shape, fortran=fortran is True)

    def fill(self, content: object, code: str, shape: object, *, fortran: bool) -> None:
        """Take the content, as a view except for bfloat16, which is copied. The number of bytes must fit the shape."""
        shape = _check_shape(shape)
        if not isinstance(content, bytes | bytearray):
            raise PickleRefusedError("refused: an array without bytes")
        if code != _BFLOAT16:
            flat = np.frombuffer(content, dtype=np.dtype(DtypeBuilder(code).code))
        else:
            # The upper half of a float32
            flat = (np.frombuffer(content, dtype="<u2").astype("<u4") << 16).view("<f4")
        if flat.size != math.prod(shape):
            raise PickleRefusedError("refused: an array that holds fewer or more numbers than it says")
        self._array = flat.reshape(shape, order="F" if fortran else "C")

    @classmethod
    def strided(cls, numbers: np.ndarray, offset: object, size: object, stride: object) -> ArrayBuilder:
        """A tensor: element `i, j, ...` is `numbers[offset + i * stride[0] + j * stride[1] + ...]`."""
        shape, steps = _check_shape(size), _check_integers(stride)
        if len(shape) != len(steps) or type(offset) is not int or offset < 0:
            raise PickleRefusedError("refused: a tensor with an unknown layout")
        last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        if math.prod(shape) and last >= numbers.size:
            raise PickleRefusedError("refused: a tensor that reaches beyond its numbers")
        if math.prod(shape) > numbers.size:
            raise PickleRefusedError("refused: a tensor that repeats its numbers")
        parts = cls()
        tail = numbers[offset:] if math.prod(shape) else numbers[:0]
        bytes_apart = [step * numbers.itemsize for step in steps]
        parts._array = np.lib.stride_tricks.as_strided(tail, shape, bytes_apart, writeable=False)
        return parts

    def array(self) -> np.ndarray:
        if self._array is None:
            raise PickleRefusedError("refused: an array without content")
        view = self._array.view()
        view.flags.writeable = False
        return view


def _check_shape(value: object) -> tuple[int, ...]:
    """A tuple of sizes, checked so that their product asks for no absurd memory."""
    sizes = _check_integers(value)
    if math.prod(sizes) > MAX_ELEMENTS:
        raise PickleRefusedError("refused: an array with too many numbers")
    return sizes


def _check_integers(value: object) -> tuple[int, ...]:
    """A short tuple of numbers that cannot overflow."""
    if type(value) is not tuple or len(value) > MAX_DIMENSIONS:
        raise PickleRefusedError("refused: an array with an unknown shape")
    for size in value:
        if type(size) is not int or not 0 <= size <= MAX_ELEMENTS:
            raise PickleRefusedError("refused: an array with an unknown shape")
    return value


class PlainCopier:
    """Copies the result of a pickle, with arrays in the place of their parts, and refuses whatever is not plain.

    A container that is `shared` is copied once and charged at every reference.
    """

    def __init__(self, budget: Budget, shared: set[int]) -> None:
        self.budget = budget
        self.shared = shared
        self.done: dict[tuple[int, int], tuple[Any, int]] = {}  # by id and depth: the copy and its charge

    def of(self, value: Any, depth: int) -> Any:
        if id(value) not in self.shared:
            return self.copy(value, depth)
        key = id(value), depth
        if key in self.done:
            self.budget.charge(self.done[key][1])
        else:
            before = self.budget.bytes
            plain = self.copy(value, depth)
            self.done[key] = plain, before - self.budget.bytes
        return self.done[key][0]

    def copy(self, value: Any, depth: int) -> Any:
        if depth < 0:
            raise PickleRefusedError(f"refused: far deeper than {self.budget.kind}")
        if type(value) is ArrayBuilder:
            array = value.array()
            self.budget.charge(REFERENCE_BYTES + sys.getsizeof(value) + array.nbytes)
            return array
        self.budget.charge(REFERENCE_BYTES + sys.getsizeof(value))
        if type(value) in (type(None), bool, int, float, str, bytes):
            return value
        if type(value) is bytearray:
            return bytes(value)
        if type(value) is list:
            return [self.of(item, depth - 1) for item in value]
        if type(value) is tuple:
            return tuple(self.of(item, depth - 1) for item in value)
        if type(value) is dict:
            return {key: self.of(item, depth - 1) for key, item in value.items()}
        raise PickleRefusedError("refused: the pickle holds something that is neither plain nor an array")

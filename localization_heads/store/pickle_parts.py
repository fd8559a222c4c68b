"""Building blocks of the safe pickle reader: limits on instructions and bytes, builders for dtypes and arrays, and the
final copy, which admits only plain values.

The bytes, dtype, shape and strides of an array or tensor are checked before the array is created.
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
"""Bytes of one reference in a list, on the stack or in the memo."""

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
    """The pickle is broken, exceeds a limit, or requests something that is not on the allow-list."""


@dataclass(frozen=True)
class Limits:
    """Limits for a pickle: the number of instructions and the nesting depth of its values.

    Args:
        kind: what kind of file is expected, for error messages.
    """

    instructions: int = 1_000_000  # an analysis of 10,000 heads takes 250,000
    depth: int = 16
    kind: str = "an attention file"


class Budget:
    """What remains of the instructions and bytes that a pickle of `size` bytes may use."""

    def __init__(self, size: int, limits: Limits) -> None:
        self.bytes = 7 * size + (56 << 20)  # RefCOCO's refs, mostly short strings, take 7 times their size
        self.instructions = limits.instructions
        self.kind = limits.kind

    def charge(self, count: int) -> None:
        """Subtract `count` bytes that are about to be allocated."""
        self.bytes -= count
        if self.bytes < 0:
            raise PickleRefusedError(
                f"refused: it would build far more bytes than the file holds, which {self.kind} never does"
            )

    def step(self) -> None:
        """Subtract one instruction."""
        self.instructions -= 1
        if self.instructions < 0:
            raise PickleRefusedError(f"refused: far more instructions than {self.kind} needs")


def storage_dtype(module: object, name: object) -> str | None:
    """The numpy dtype of a torch storage class, or None if there is no such class.

    >>> storage_dtype("torch", "HalfStorage")
    '<f2'
    """
    if module not in ("torch", "torch.cuda") or type(name) is not str:
        return None
    return _STORAGE_DTYPES.get(name)


class DtypeBuilder:
    """A numeric dtype under construction: its code (`f4`), then its byte order. Objects, text and records fail."""

    def __init__(self, code: object) -> None:
        if type(code) is not str or not re.fullmatch(r"[<>|=]?(f[248]|[iu][1248]|b1)", code):
            raise PickleRefusedError(f"refused: arrays of type {shown(code)} are not taken")
        self.code = code

    def set_state(self, state: object) -> None:
        """Apply numpy's state tuple `(3, byte order, None, None, None, -1, -1, 0)`."""
        if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise PickleRefusedError("refused: an unknown form of dtype")
        if state[2:5] != (None, None, None):
            raise PickleRefusedError("refused: arrays of records are not taken")
        self.code = state[1] + self.code.lstrip("<>|=")


def dtype_code(dtype: object) -> str:
    """The code of a dtype that the pickle built. A plain string is refused: it could claim to be bfloat16."""
    if type(dtype) is not DtypeBuilder:
        raise PickleRefusedError("refused: an array of an unknown type")
    return dtype.code


class ArrayBuilder:
    """An array under construction, from bytes, dtype and shape. `array()` is a read-only view of the bytes."""

    __slots__ = ("_array",)

    def __init__(self) -> None:
        self._array: np.ndarray | None = None

    def __sizeof__(self) -> int:
        """Includes the numpy views but not the bytes they refer to."""
        return 300

    def set_state(self, state: object) -> None:
        """Apply numpy's state tuple `(version, shape, dtype, is_fortran, bytes)`."""
        if type(state) is not tuple or len(state) != 5:
            raise PickleRefusedError("refused: an unknown form of array")
        _, shape, dtype, fortran, content = state
        self.fill(content, dtype_code(dtype), shape, fortran=fortran is True)

    def fill(self, content: object, code: str, shape: object, *, fortran: bool) -> None:
        """Set the content as a view (bfloat16: a float32 copy). The number of bytes must match the shape."""
        shape = _check_shape(shape)
        if not isinstance(content, bytes | bytearray):
            raise PickleRefusedError("refused: an array without bytes")
        if code != _BFLOAT16:
            flat = np.frombuffer(content, dtype=np.dtype(DtypeBuilder(code).code))
        else:
            # bfloat16 is the upper half of a float32
            flat = (np.frombuffer(content, dtype="<u2").astype("<u4") << 16).view("<f4")
        if flat.size != math.prod(shape):
            raise PickleRefusedError("refused: an array whose shape does not match its bytes")
        self._array = flat.reshape(shape, order="F" if fortran else "C")

    @classmethod
    def strided(cls, numbers: np.ndarray, offset: object, size: object, stride: object) -> ArrayBuilder:
        """A tensor: element `i, j, ...` is `numbers[offset + i * stride[0] + j * stride[1] + ...]`."""
        shape, strides = _check_shape(size), _check_integers(stride)
        if len(shape) != len(strides) or type(offset) is not int or offset < 0:
            raise PickleRefusedError("refused: a tensor with an unknown layout")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= numbers.size:
            raise PickleRefusedError("refused: a tensor that reaches past its storage")
        if math.prod(shape) > numbers.size:
            raise PickleRefusedError("refused: a tensor larger than its storage")
        parts = cls()
        tail = numbers[offset:] if math.prod(shape) else numbers[:0]
        byte_strides = [step * numbers.itemsize for step in strides]
        parts._array = np.lib.stride_tricks.as_strided(tail, shape, byte_strides, writeable=False)
        return parts

    def array(self) -> np.ndarray:
        if self._array is None:
            raise PickleRefusedError("refused: an array without content")
        view = self._array.view()
        view.flags.writeable = False
        return view


def _check_shape(value: object) -> tuple[int, ...]:
    """A shape whose number of elements is within bounds."""
    sizes = _check_integers(value)
    if math.prod(sizes) > MAX_ELEMENTS:
        raise PickleRefusedError("refused: an array with too many numbers")
    return sizes


def _check_integers(value: object) -> tuple[int, ...]:
    """A short tuple of non-negative integers, bounded so that products cannot overflow."""
    if type(value) is not tuple or len(value) > MAX_DIMENSIONS:
        raise PickleRefusedError("refused: an array with an unknown shape")
    for size in value:
        if type(size) is not int or not 0 <= size <= MAX_ELEMENTS:
            raise PickleRefusedError("refused: an array with an unknown shape")
    return value


class PlainCopier:
    """Copies the result of a pickle, replacing builders by their arrays, and refuses anything that is not plain.

    A `shared` container is copied once but charged for every reference to it.
    """

    def __init__(self, budget: Budget, shared: set[int]) -> None:
        self.budget = budget
        self.shared = shared
        self.copies: dict[tuple[int, int], tuple[Any, int]] = {}  # (id, depth) -> copy, its charge

    def of(self, value: Any, depth: int) -> Any:
        if id(value) not in self.shared:
            return self.copy(value, depth)
        key = id(value), depth
        if key in self.copies:
            self.budget.charge(self.copies[key][1])
        else:
            before = self.budget.bytes
            plain = self.copy(value, depth)
            self.copies[key] = plain, before - self.budget.bytes
        return self.copies[key][0]

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

"""Reading pickles as data: a small interpreter that builds plain values and never calls what a pickle names.

A pickle is a program, and Python's unpickler runs it. This reader knows only the instructions that plain
containers, numpy arrays and CPU tensors need. A name in the pickle is looked up in an allow-list and stands
for one of *our* constructors, so a pickle can make nothing be imported or called. torch
is not needed to read a tensor: its storage is bytes after a short header.

The limits are on what is built, not on what is read. A pickle can refer to one value a million times, so every step
that makes, copies or refers to something is charged to a `Budget`, which is in proportion to the file; the result is
charged once more with every reference counted as a copy, since callers may copy (`np.stack` of a list does). Only text
and short integers are hashed: hashing a deep tuple crashes Python, and hashing a long integer is slow every time.
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from localization_heads.errors import UsageError, shown
from localization_heads.store.pickle_parts import (
    REFERENCE_BYTES,
    ArrayBuilder,
    Budget,
    DtypeBuilder,
    Limits,
    PickleRefusedError,
    PlainCopier,
    dtype_code,
    storage_dtype,
)

MAX_FILE_BYTES = 4 << 30
MAX_INTEGER_BITS = 1 << 15
ATTENTION_LIMITS = Limits()
"""For attention files and the files beside them."""

_DICT_ENTRY_BYTES = 300
"""Bytes of one value's entry in a dict."""


class _Global(NamedTuple):
    """A global that the pickle names and the allow-list knows."""

    module: str
    name: str


class _Storage(NamedTuple):
    """The flat numbers under a tensor."""

    numbers: np.ndarray


_MARK = object()
"""The bottom of a list of arguments on the stack; in the memo, a number that was left out."""


def check_file(path: Path) -> None:
    """UsageError unless there is a file of at most `MAX_FILE_BYTES`."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UsageError(f"{path}: larger than the limit of {MAX_FILE_BYTES >> 30} GiB")


def load_pickle(path: str | Path, limits: Limits = ATTENTION_LIMITS) -> Any:
    """The plain value in a pickle file: None, numbers, text, bytes, lists, tuples, dicts and numpy arrays.

    Arrays are read-only views. Tensors come as arrays (bfloat16 as float32). Raises UsageError, in one line
    that names the file, for a file that is missing, broken, too large or asks for anything else.
    """
    path = Path(path)
    try:
        check_file(path)
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        return loads_pickle(content, limits)
    except PickleRefusedError as error:
        raise UsageError(f"{path}: {error}") from error
    except MemoryError as error:
        raise UsageError(f"{path}: not enough memory to read it") from error


def loads_pickle(content: bytes, limits: Limits = ATTENTION_LIMITS) -> Any:
    """`load_pickle` for bytes; raises PickleRefusedError."""
    if content[:4] == b"PK\x03\x04":
        raise PickleRefusedError(
            "a zip archive (of torch.save?), not a pickle: save the maps as .pkl or .safetensors"
        )
    machine = _Machine(BytesIO(content), Budget(len(content), limits))
    value = machine.run()
    return PlainCopier(Budget(len(content), limits), machine.shared).of(value, limits.depth)


class _Machine:
    """The stack machine of the pickle protocol (0 to 5), without the instructions that run code."""

    def __init__(self, stream: BytesIO, budget: Budget, *, storages: bool = False) -> None:
        self.stream = stream
        self.budget = budget
        self.storages = storages  # whether persistent ids, which name tensor storages, may be used
        self.stack: list[Any] = []
        self.memo: list[Any] = []  # a dict would take ten times the memory of writers that count
        self.shared: set[int] = set()  # ids of the containers that are referred to more than once

    def run(self) -> Any:
        """Run to the STOP instruction; the stream is left behind it."""
        try:
            for opcode, argument, _ in pickletools.genops(self.stream):
                self.budget.step()
                if opcode.name == "STOP":
                    break
                self.step(opcode.name, argument)
            (value,) = self.stack
            return value
        except PickleRefusedError:
            raise
        except Exception as error:  # whatever garbage makes of a stack machine, it is garbage
            raise PickleRefusedError(
                f"not a readable pickle, or cut short ({type(error).__name__})"
            ) from error

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.push(_LITERALS[name](argument))
        elif name in _OPCODES:
            _OPCODES[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise PickleRefusedError(f"refused: the pickle uses {name}, which {self.budget.kind} never needs")

    def push(self, value: Any) -> None:
        """Put a new value on the stack."""
        self.budget.charge(REFERENCE_BYTES + sys.getsizeof(value))
        self.stack.append(value)

    def push_again(self, index: int) -> None:
        """Put a value of the memo on the stack."""
        value = self.memo[index] if index >= 0 else _MARK
        if value is _MARK:
            raise PickleRefusedError("not a readable pickle: a number that was never given out")
        self.budget.charge(REFERENCE_BYTES)
        if type(value) in (list, tuple, dict) and id(value) not in self.shared:
            self.budget.charge(_DICT_ENTRY_BYTES)
            self.shared.add(id(value))
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """Take the values above the last mark, and the mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleRefusedError("not a readable pickle: no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def pack(self, count: int) -> None:
        values = tuple(self.stack[-count:])
        if len(values) != count:
            raise PickleRefusedError("not a readable pickle: empty stack")
        del self.stack[-count:]
        self.push(values)

    def memoize(self, index: int) -> None:
        """Give the top of the stack a number. Writers count, from 0 or 1; what they leave out is charged too."""
        missing = index + 1 - len(self.memo)
        if index < 0 or self.stack[-1] is _MARK:
            raise PickleRefusedError("not a readable pickle: a number for nothing")
        self.budget.charge(REFERENCE_BYTES * max(0, missing))
        self.memo.extend(repeat(_MARK, missing))
        self.memo[index] = self.stack[-1]

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise PickleRefusedError("refused: the pickle appends to something that is no list")
        target.extend(values)

    def make_dict(self, flat: list[Any]) -> None:
        self.push({})
        self.set_items(flat)

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(flat) % 2:
            raise PickleRefusedError("refused: the pickle sets an item of something that is no dict")
        size = sys.getsizeof(target)
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(key) not in (str, int):
                raise PickleRefusedError("refused: a key that is neither text nor a whole number")
            target[key] = value
        self.budget.charge(sys.getsizeof(target) - size)

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:  # before either is hashed or shown
            raise PickleRefusedError("refused: the pickle asks for something whose name is no text")
        if (module, name) not in _ALLOWED and not (self.storages and storage_dtype(module, name)):
            asked = shown(f"{module[:80]}.{name[:80]}", 80)[1:-1]
            raise PickleRefusedError(
                f"refused: the pickle asks for {asked}, which {self.budget.kind} never needs"
            )
        self.push(_Global(module, name))

    def reduce(self) -> None:
        arguments = self.stack.pop()
        target = self.stack.pop()
        if type(target) is not _Global or type(arguments) is not tuple or _ALLOWED.get(target) is None:
            raise PickleRefusedError("refused: the pickle calls something that is no constructor of arrays")
        self.push(_ALLOWED[target](self, *arguments))  # type: ignore[misc]

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) not in (ArrayBuilder, DtypeBuilder):
            raise PickleRefusedError("refused: the pickle sets the state of something that is no array")
        target.set_state(state)

    def persistent(self) -> None:
        pid = self.stack.pop()
        if not self.storages:
            raise PickleRefusedError("refused: the pickle refers to data outside itself")
        self.stack.append(pid)


_INTEGERS = ("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4")
_PLAIN_LITERALS = (
    *("FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)


def _bounded_integer(value: int) -> int:
    if value.bit_length() > MAX_INTEGER_BITS:
        raise PickleRefusedError(f"refused: a whole number of more than {MAX_INTEGER_BITS} bits")
    return value


def _python2_text(text: str) -> str:
    """What Python 2 wrote as a plain string: bytes, here as Latin-1; UTF-8 where they are that."""
    try:
        return text if text.isascii() else text.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return text


_LITERALS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_INTEGERS, _bounded_integer),
    **dict.fromkeys(_PLAIN_LITERALS, lambda argument: argument),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _python2_text),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "MARK": lambda _: _MARK,
}

_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "LIST": lambda m, _: m.push(m.since_mark()),
    "DICT": lambda m, _: m.make_dict(m.since_mark()),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.pack(1),
    "TUPLE2": lambda m, _: m.pack(2),
    "TUPLE3": lambda m, _: m.pack(3),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "MEMOIZE": lambda m, _: m.memoize(len(m.memo)),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.push_again),
    "GLOBAL": lambda m, names: m.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.name(m.stack.pop(-2), m.stack.pop()),
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.persistent(),
}


def _new_array(_: _Machine, kind: Any, shape: Any, code: Any) -> ArrayBuilder:
    """`numpy.core.multiarray._reconstruct(ndarray, (0,), b"b")`: empty until BUILD brings the content."""
    if kind != _Global("numpy", "ndarray"):
        raise PickleRefusedError("refused: an array of an unknown class")
    return ArrayBuilder()


def _array_from_buffer(_: _Machine, buffer: Any, kind: Any, shape: Any, order: Any) -> ArrayBuilder:
    """`numpy.core.numeric._frombuffer`, the form of protocol 5."""
    parts = ArrayBuilder()
    parts.fill(buffer, dtype_code(kind), shape, fortran=order == "F")
    return parts


def _numpy_scalar(_: _Machine, kind: Any, content: Any) -> bool | int | float:
    """`numpy.core.multiarray.scalar`, as the plain number it holds."""
    parts = ArrayBuilder()
    parts.fill(content, dtype_code(kind), (), fortran=False)
    value: bool | int | float = parts.array().item()
    return value


def _empty_dict(_: _Machine, *arguments: Any) -> dict[str, Any]:
    """`OrderedDict()`: a tensor carries an empty one for its hooks."""
    if arguments not in ((), ([],)):
        raise PickleRefusedError("refused: an OrderedDict made from something")
    return {}


def _encoded_bytes(machine: _Machine, text: Any, encoding: Any) -> bytes:
    """`_codecs.encode(text, "latin1")`: how protocol 2 writes bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise PickleRefusedError("refused: text in an unknown encoding")
    machine.budget.charge(len(text))
    return text.encode("latin1")


def _load_storage(machine: _Machine, content: Any) -> _Storage:
    """`torch.storage._load_from_bytes`: five pickled headers, then a count (int64) and the raw numbers."""
    if type(content) is not bytes:
        raise PickleRefusedError("not a readable pickle: a tensor without bytes")
    machine.budget.charge(3 * len(content))  # the copy of the numbers, and bfloat16 at twice its size
    stream = BytesIO(content)
    for _header in range(3):  # magic number, protocol version, byte order and sizes
        header = _Machine(stream, machine.budget).run()
    if type(header) is not dict or header.get("little_endian") is not True:
        raise PickleRefusedError("refused: a tensor in an unknown byte order")
    pid = _Machine(stream, machine.budget, storages=True).run()
    _Machine(stream, machine.budget).run()  # the list of storage keys
    match pid:
        case ("storage", _Global(module, name), str(), str(), int(count), *_):
            code = storage_dtype(module, name)
        case _:
            code = None
    if code is None:
        raise PickleRefusedError("not a readable pickle: an unknown tensor storage")
    parts = ArrayBuilder()
    parts.fill(content[stream.tell() + 8 :], code, (count,), fortran=False)
    return _Storage(parts.array())


def _rebuild_tensor(
    _: _Machine, storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any
) -> ArrayBuilder:
    """`torch._utils._rebuild_tensor_v2`: a strided view of a storage."""
    if type(storage) is not _Storage:
        raise PickleRefusedError("not a readable pickle: a tensor without storage")
    return ArrayBuilder.strided(storage.numbers, offset, size, stride)


_ALLOWED: dict[tuple[str, str], Callable[..., Any] | None] = {
    ("numpy", "ndarray"): None,  # named as an argument, never called
    ("numpy", "dtype"): lambda _, code, *_flags: DtypeBuilder(code),
    ("collections", "OrderedDict"): _empty_dict,
    ("_codecs", "encode"): _encoded_bytes,
    ("__builtin__", "bytes"): lambda _: b"",  # how protocol 2 writes b""
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    **{(f"{core}.multiarray", "_reconstruct"): _new_array for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.multiarray", "scalar"): _numpy_scalar for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.numeric", "_frombuffer"): _array_from_buffer for core in ("numpy.core", "numpy._core")},
}

"""Read untrusted pickles as data: a small interpreter that builds plain values and never calls what a pickle names.

A pickle is a program that Python's unpickler executes. This reader implements only the instructions that plain
containers, numpy arrays and CPU tensors need. A global named by the pickle is looked up in an allow-list that maps it
to one of *our* constructors, so a pickle cannot import or call anything. Reading a tensor does not need torch: its
storage is raw bytes after a short header.

The limits apply to what is built, not to what is read. A pickle can refer to one value a million times, so every step
that creates, copies or references something is charged to a `Budget` in proportion to the file size. The result is
charged again with every reference counted as a copy, since callers may copy (`np.stack` of a list does). Only strings
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
"""For attention files and their metadata."""

_DICT_ENTRY_BYTES = 300
"""Bytes of an entry in a dict or set."""


class _Global(NamedTuple):
    """A global named by the pickle that is on the allow-list."""

    module: str
    name: str


class _Storage(NamedTuple):
    """The flat array that a tensor is a view of."""

    numbers: np.ndarray


_MARK = object()
"""The pickle MARK on the stack; in the memo, an index that was skipped."""


def check_file(path: Path) -> None:
    """UsageError unless `path` is a file of at most `MAX_FILE_BYTES`."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UsageError(f"{path}: larger than the limit of {MAX_FILE_BYTES >> 30} GiB")


def load_pickle(path: str | Path, limits: Limits = ATTENTION_LIMITS) -> Any:
    """The value in a pickle file: None, numbers, strings, bytes, lists, tuples, dicts and numpy arrays.

    Arrays are read-only views. Tensors become arrays (bfloat16 becomes float32). Raises UsageError, naming the file, if
    it is missing, broken, too large or contains anything else.
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
        raise PickleRefusedError("a zip archive (of torch.save?), not a pickle: save the maps as .pkl or .safetensors")
    machine = _Machine(BytesIO(content), Budget(len(content), limits))
    value = machine.run()
    return PlainCopier(Budget(len(content), limits), machine.shared).of(value, limits.depth)


class _Machine:
    """The stack machine of the pickle protocol (0 to 5), without the instructions that run code."""

    def __init__(self, stream: BytesIO, budget: Budget, *, storages: bool = False) -> None:
        self.stream = stream
        self.budget = budget
        self.storages = storages  # whether persistent ids, which refer to tensor storages, are allowed
        self.stack: list[Any] = []
        # A list, since indices are consecutive: a dict would take ten times the memory.
        self.memo: list[Any] = []
        self.shared: set[int] = set()  # ids of containers that are referenced more than once

    def run(self) -> Any:
        """Execute up to and including STOP; the stream is then positioned after it."""
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
        except Exception as error:  # garbage may raise anything in a stack machine
            raise PickleRefusedError(f"not a readable pickle, or cut short ({type(error).__name__})") from error

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.push(_LITERALS[name](argument))
        elif name in _OPCODES:
            _OPCODES[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise PickleRefusedError(f"refused: the pickle uses {name}, which {self.budget.kind} never needs")

    def push(self, value: Any) -> None:
        """Push a new value."""
        self.budget.charge(REFERENCE_BYTES + sys.getsizeof(value))
        self.stack.append(value)

    def push_from_memo(self, index: int) -> None:
        """Push a value from the memo again."""
        value = self.memo[index] if index >= 0 else _MARK
        if value is _MARK:
            raise PickleRefusedError("not a readable pickle: a memo index that was never set")
        self.budget.charge(REFERENCE_BYTES)
        if type(value) in (list, tuple, dict) and id(value) not in self.shared:
            self.budget.charge(_DICT_ENTRY_BYTES)
            self.shared.add(id(value))
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        """Pop the values above the last mark, and the mark itself."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleRefusedError("not a readable pickle: no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def push_tuple(self, count: int) -> None:
        """Replace the top `count` values by a tuple of them."""
        values = tuple(self.stack[-count:])
        if len(values) != count:
            raise PickleRefusedError("not a readable pickle: empty stack")
        del self.stack[-count:]
        self.push(values)

    def memoize(self, index: int) -> None:
        """Store the top of the stack in the memo. Writers count from 0 or 1; skipped indices are charged too."""
        num_skipped = index + 1 - len(self.memo)
        if index < 0 or self.stack[-1] is _MARK:
            raise PickleRefusedError("not a readable pickle: a memo index without a value")
        self.budget.charge(REFERENCE_BYTES * max(0, num_skipped))
        self.memo.extend(repeat(_MARK, num_skipped))
        self.memo[index] = self.stack[-1]

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise PickleRefusedError("refused: the pickle appends to something that is not a list")
        target.extend(values)

    def make_dict(self, flat: list[Any]) -> None:
        self.push({})
        self.set_items(flat)

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(flat) % 2:
            raise PickleRefusedError("refused: the pickle sets an item of something that is not a dict")
        size = sys.getsizeof(target)
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(key) not in (str, int):
                raise PickleRefusedError("refused: a key that is neither text nor an integer")
            target[key] = value
        self.budget.charge(sys.getsizeof(target) - size)

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:  # before either is hashed or shown
            raise PickleRefusedError("refused: the pickle asks for something whose name is not text")
        if (module, name) not in _ALLOWED and not (self.storages and storage_dtype(module, name)):
            asked = shown(f"{module[:80]}.{name[:80]}", 80)[1:-1]
            raise PickleRefusedError(f"refused: the pickle asks for {asked}, which {self.budget.kind} never needs")
        self.push(_Global(module, name))

    def reduce(self) -> None:
        arguments = self.stack.pop()
        target = self.stack.pop()
        if type(target) is not _Global or type(arguments) is not tuple or _ALLOWED.get(target) is None:
            raise PickleRefusedError("refused: the pickle calls something that is not a constructor of arrays")
        self.push(_ALLOWED[target](self, *arguments))  # type: ignore[misc]

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) not in (ArrayBuilder, DtypeBuilder):
            raise PickleRefusedError("refused: the pickle sets the state of something that is not an array")
        target.set_state(state)

    def load_persistent(self) -> None:
        persistent_id = self.stack.pop()
        if not self.storages:
            raise PickleRefusedError("refused: the pickle refers to data outside itself")
        self.stack.append(persistent_id)


_INTEGERS = ("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4")
_PLAIN_LITERALS = (
    *("FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)


def _bounded_integer(value: int) -> int:
    if value.bit_length() > MAX_INTEGER_BITS:
        raise PickleRefusedError(f"refused: an integer of more than {MAX_INTEGER_BITS} bits")
    return value


def _python2_text(text: str) -> str:
    """Decode a Python 2 `str`, which pickletools gives as Latin-1: as UTF-8 if it is valid UTF-8."""
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
    "LIST": lambda m, _: m.push(m.pop_to_mark()),
    "DICT": lambda m, _: m.make_dict(m.pop_to_mark()),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.push_tuple(1),
    "TUPLE2": lambda m, _: m.push_tuple(2),
    "TUPLE3": lambda m, _: m.push_tuple(3),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "MEMOIZE": lambda m, _: m.memoize(len(m.memo)),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.push_from_memo),
    "GLOBAL": lambda m, names: m.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.name(m.stack.pop(-2), m.stack.pop()),
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.load_persistent(),
}


def _new_array(_: _Machine, cls: Any, shape: Any, code: Any) -> ArrayBuilder:
    """`numpy.core.multiarray._reconstruct(ndarray, (0,), b"b")`: empty until BUILD sets its content."""
    if cls != _Global("numpy", "ndarray"):
        raise PickleRefusedError("refused: an array of an unknown class")
    return ArrayBuilder()


def _array_from_buffer(_: _Machine, buffer: Any, dtype: Any, shape: Any, order: Any) -> ArrayBuilder:
    """`numpy.core.numeric._frombuffer`, used by protocol 5."""
    parts = ArrayBuilder()
    parts.fill(buffer, dtype_code(dtype), shape, fortran=order == "F")
    return parts


def _numpy_scalar(_: _Machine, dtype: Any, content: Any) -> bool | int | float:
    """`numpy.core.multiarray.scalar`, converted to a Python number."""
    parts = ArrayBuilder()
    parts.fill(content, dtype_code(dtype), (), fortran=False)
    value: bool | int | float = parts.array().item()
    return value


def _empty_dict(_: _Machine, *arguments: Any) -> dict[str, Any]:
    """`OrderedDict()`: a pickled tensor has an empty one for its hooks."""
    if arguments not in ((), ([],)):
        raise PickleRefusedError("refused: an OrderedDict with content")
    return {}


def _encoded_bytes(machine: _Machine, text: Any, encoding: Any) -> bytes:
    """`_codecs.encode(text, "latin1")`, which is how protocol 2 writes bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise PickleRefusedError("refused: text in an unknown encoding")
    machine.budget.charge(len(text))
    return text.encode("latin1")


def _load_storage(machine: _Machine, content: Any) -> _Storage:
    """`torch.storage._load_from_bytes`: five pickled headers, then the count (int64) and the raw values."""
    if type(content) is not bytes:
        raise PickleRefusedError("not a readable pickle: a tensor without bytes")
    machine.budget.charge(3 * len(content))  # a copy of the values, and for bfloat16 twice their size
    stream = BytesIO(content)
    for _header in range(3):  # magic number, protocol version, byte order and sizes
        header = _Machine(stream, machine.budget).run()
    if type(header) is not dict or header.get("little_endian") is not True:
        raise PickleRefusedError("refused: a tensor in an unknown byte order")
    persistent_id = _Machine(stream, machine.budget, storages=True).run()
    _Machine(stream, machine.budget).run()  # the list of storage keys
    match persistent_id:
        case ("storage", _Global(module, name), str(), str(), int(count), *_):
            code = storage_dtype(module, name)
        case _:
            code = None
    if code is None:
        raise PickleRefusedError("not a readable pickle: an unknown tensor storage")
    parts = ArrayBuilder()
    parts.fill(content[stream.tell() + 8 :], code, (count,), fortran=False)
    return _Storage(parts.array())


def _rebuild_tensor(_: _Machine, storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> ArrayBuilder:
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

"""The safe pickle reader: plain values round-trip, hostile pickles are refused, and nothing is ever executed."""

from __future__ import annotations

import builtins
import collections
import contextlib
import copyreg
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from localization_heads.errors import UsageError
from localization_heads.store.pickle_parts import PickleRefusedError
from localization_heads.store.safe_pickle import load_pickle, loads_pickle

PROTOCOLS = (2, 3, 4, 5)
CORE = sys.modules.get("numpy._core") or sys.modules["numpy.core"]  # numpy 2 and 1


class Call:
    """An object whose pickle calls `function(*arguments)` and optionally sets a state on the result."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        None,
        {"a": [1, (2.5, True, False), "text", b"bytes", None, -1, 10**30], 7: {}},
        [[], (), {}, "", b"", float("inf")],
        ("ä" * 300, b"\xff" * 300, [0] * 2000),
        [[1, 2]] * 3,  # one list, referenced three times
    ],
)
def test_plain_values_round_trip(value, protocol):
    assert loads_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f2", "f8", "i8", "u1", "bool"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_round_trip(dtype, order, protocol):
    array = np.asarray(np.arange(24).reshape(2, 3, 4) % 5, dtype=dtype, order=order)
    result = loads_pickle(pickle.dumps(array, protocol))
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)
    assert not result.flags.writeable


def test_numpy_1_arrays_are_read():
    old = pickle.dumps(np.arange(6, dtype="f4"), protocol=2).replace(b"numpy._core", b"numpy.core")
    np.testing.assert_array_equal(loads_pickle(old), np.arange(6))


@pytest.mark.parametrize("value", [np.float32(1.5), np.int64(7), np.bool_(True), np.float64("inf")])
def test_numpy_scalars_become_python_numbers(value):
    result = loads_pickle(pickle.dumps(value))
    assert result == value
    assert type(result) in (float, int, bool)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_tensors_round_trip_as_arrays(dtype, protocol):
    tensor = torch.arange(240).reshape(2, 3, 4, 10).to(dtype)
    for view in (tensor, tensor[:, :, -1:, 2:7], tensor.transpose(0, 3), tensor[:0], tensor[1, 2, 3, 4]):
        expected = view.float().numpy()
        np.testing.assert_array_equal(loads_pickle(pickle.dumps(view, protocol)).astype("f4"), expected)


def test_tensor_of_a_7b_model_is_read():
    """The product of its strides far exceeds its 590,000 elements, which is valid."""
    tensor = torch.arange(32 * 32 * 576, dtype=torch.float32).reshape(32, 32, 1, 576)
    np.testing.assert_array_equal(loads_pickle(pickle.dumps(tensor)), tensor.numpy())


def test_reading_a_tensor_does_not_import_torch(tmp_path):
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(torch.rand(2, 2, 1, 4)))
    code = (
        "import sys; from localization_heads.store.attention_files import load_attention; "
        "load_attention(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "t.pkl")], check=True)


def _stack_global(module: str, name: str) -> bytes:
    text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return text + b"\x93"


EMPTY = b"\x80\x04" + _stack_global("numpy._core.multiarray", "_reconstruct") + _stack_global("numpy", "ndarray")
EMPTY += b"K\x00\x85C\x01b\x87R"
ENCODE = _stack_global("_codecs", "encode")


def _nested(*parts: bytes) -> bytes:
    """A call of torch's `_load_from_bytes` with these parts as its content."""
    return pickle.dumps(Call(torch.storage._load_from_bytes, b"".join(parts)))


def _reconstruct(kind: str, state: bytes) -> bytes:
    """An array by `_reconstruct`, with a dtype code and pickled items of the state tuple."""
    text = b"\x8c" + bytes([len(kind)]) + kind.encode()
    state = state.replace(b"DTYPE", _stack_global("numpy", "dtype") + text + b"\x89\x88\x87R")
    return EMPTY + b"(K\x01" + state + b"tb."


def _laughs(depth: int) -> bytes:
    """Nested pairs that share their elements: 2**depth leaves in a few bytes."""
    return b"\x80\x04)" + b"\x94" + b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(depth)) + b"."


def _wide_laughs() -> bytes:
    """Four levels of lists with 1000 references to the next: 10**12 leaves."""
    return b"\x80\x04(]\x94" + b"".join(b"](" + bytes([0x68, i]) * 1000 + b"e\x94" for i in range(4)) + b"t."


def _hostile_tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A tensor of 4 elements whose storage claims `numel`, viewed with any size, stride and offset."""
    content = pickle.dumps(torch.zeros(4)).replace(b"K\x04Nt", b"K" + bytes([numel]) + b"Nt")
    names = ("SHORT_BINBYTES", "BINBYTES")
    raw = next(argument for op, argument, _ in pickletools.genops(content) if op.name in names)
    load = _stack_global("torch.storage", "_load_from_bytes")
    storage = load + b"B" + struct.pack("<I", len(raw)) + raw + b"\x85R"
    numbers, steps = (b"(" + b"".join(map(_integer, values)) + b"t" for values in (size, stride))
    hooks = b"\x89" + _stack_global("collections", "OrderedDict") + b")R"
    rebuild = b"\x80\x04" + _stack_global("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + storage + _integer(offset) + numbers + steps + hooks + b"tR."


def _text(length: int) -> bytes:
    return b"X" + struct.pack("<I", length) + b"a" * length


def _shared(value: bytes, references: int) -> bytes:
    """A list of `references` references to one value."""
    return b"\x80\x05](" + value + b"\x94" + b"h\x00" * (references - 1) + b"e."


def _integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def _array(count: int) -> bytes:
    type_, size = _stack_global("numpy", "dtype") + b"\x8c\x02f2\x85R", _integer(count)
    content = b"\x96" + struct.pack("<Q", 2 * count) + bytes(2 * count)
    arguments = b"(" + content + type_ + size + b"\x85\x8c\x01Ct"
    return _stack_global("numpy._core.numeric", "_frombuffer") + arguments + b"R"


def _bfloat16_by_name(references: int) -> bytes:
    """Repeated `_frombuffer` calls on one buffer whose dtype claims to be bfloat16."""
    constructor = _stack_global("numpy._core.numeric", "_frombuffer") + b"\x94"
    arguments = b"(B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"\x8c\x03bf2J"
    arguments += struct.pack("<i", 1 << 19) + b"\x85\x8c\x01Ct\x94"
    return b"\x80\x05" + constructor + arguments + b"](" + b"h\x00h\x01R" * references + b"e."


NESTED = b")" + b"\x85" * 400_000
"""Deeply nested tuples: hashing them overflows the C stack."""

GRAPHS = {
    "a name of nested tuples": b"\x80\x04" + NESTED + b"\x8c\x01a\x93.",
    "a module of nested tuples": b"\x80\x04\x8c\x01a" + NESTED[:-1] + b"\x93.",
    "a name of two of two of two": b"\x80\x04\x8c\x01a" + _laughs(60)[2:-1] + b"\x93.",
    "a long name": b"\x80\x04\x8c\x01a" + _text(4 << 20) + b"\x93.",
    "nested tuples as a dtype": b"\x80\x04" + _stack_global("numpy", "dtype") + NESTED + b"\x85R.",
    "a list of one array": _shared(_array(1 << 18), 5000),
    "a list of one bytearray": _shared(b"\x96" + struct.pack("<Q", 1 << 20) + bytes(1 << 20), 5000),
    "a list of one text": _shared(_text(1 << 20), 5000),
    "a list of one long list": _shared(b"](" + b"N" * 100_000 + b"e", 5000),
    "repeated bfloat16 arrays": _bfloat16_by_name(5000),
    "a number of a megabyte as a key": b"\x80\x04}\x8b" + struct.pack("<i", 1 << 20) + b"\x01" * (1 << 20)
    + b"\x94(" + b"h\x00N" * 100_000 + b"u.",
    "a repeated tensor storage": b"\x80\x04" + _stack_global("torch.storage", "_load_from_bytes")
    + b"\x94B" + struct.pack("<I", 1 << 20) + pickle.dumps(1) * (1 << 14) + bytes((1 << 20) - 5 * (1 << 14))
    + b"\x85\x94](" + b"h\x00h\x01R" * 5000 + b"e.",
}  # fmt: skip


def _poison(path: str) -> str:
    return f"open({path!r}, 'w').close()"


def hostile_pickles(touch: str) -> dict[str, bytes]:
    """Attacks that create the file `touch` if executed, and attacks on memory, time and the interpreter."""
    mark = f"touch {touch}"
    return {
        "os.system": pickle.dumps(Call(os.system, mark)),
        "os.system in protocol 0": pickle.dumps(Call(os.system, mark), protocol=0),
        "builtins.eval": pickle.dumps(Call(builtins.eval, _poison(touch))),
        "builtins.exec under a dict": pickle.dumps({"attention": Call(builtins.exec, _poison(touch))}),
        "subprocess in a list": pickle.dumps([1, Call(subprocess.getoutput, mark)]),
        "builtins.getattr": pickle.dumps(Call(builtins.getattr, "", "format")),
        "copyreg": pickle.dumps(Call(copyreg._reconstructor, collections.UserDict, object, None)),
        "copyreg.add_extension": pickle.dumps(Call(copyreg.add_extension, "os", "system", 1)),
        "an extension code": b"\x80\x04\x82\x01.",
        "a plain class": pickle.dumps(Path("x")),
        "NEWOBJ": pickle.dumps(collections.Counter("aab")),
        "INST": b"(S'" + mark.encode() + b"'\nios\nsystem\n.",
        "a persistent id": b"\x80\x04\x8c\x01aQ.",
        "a set": pickle.dumps({1, 2}),
        "torch.load of a nested pickle": _nested(pickle.dumps(Call(os.system, mark))),
        "torch.load itself": pickle.dumps(Call(torch.load, touch)),
        "a nested pickle after good headers": _nested(
            *map(pickle.dumps, (1, 1, {"little_endian": True}, Call(os.system, mark)))),
        "an array of objects": pickle.dumps(np.array([Call(os.system, mark), None], dtype=object)),
        "an object as a scalar": pickle.dumps(
            Call(CORE.multiarray.scalar, np.dtype("O"), pickle.dumps(Call(os.system, mark)))),
        "an array of records": pickle.dumps(np.zeros(2, dtype=[("a", "f4")])),
        "an array of text": pickle.dumps(np.array(["a"])),
        "a subclass of ndarray": pickle.dumps(np.ma.masked_array([1.0], [0])),
        "a memmap class": pickle.dumps(Call(CORE.multiarray._reconstruct, np.memmap, (0,), b"b")),
        "a huge ndarray by call": pickle.dumps(Call(np.ndarray, (10**12,))),
        "a dtype with strange arguments": pickle.dumps(Call(np.dtype, "O8")),
        "state set on a constructor": b"\x80\x04" + ENCODE + b"N}\x8c\x0c__defaults__)s\x86b.",
        "state set on a dict": b"\x80\x04}}\x8c\x01a)sb.",
        "a constructor as the value": b"\x80\x04" + ENCODE + b".",
        "an item of a list": b"\x80\x04]K\x00K\x01s.",
        "an append to a dict": b"\x80\x04}K\x01a.",
        "a tuple as a key": b"\x80\x04})K\x01s.",
        "nested tuples as a key": b"\x80\x04}" + b")" + b"\x85" * 200_000 + b"K\x01s.",
        "billion laughs": _laughs(60),
        "wide laughs": _wide_laughs(),
        "a deep list": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "a list in itself": b"\x80\x04]\x94h\x00a.",
        "too many instructions": b"\x80\x04" + b"N" * 1_000_001 + b".",
        "bytes of 4 GB": b"\x80\x04B\xff\xff\xff\xffabc.",
        "bytes of 8 EB": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        "a bytearray of 1 TB": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"abc.",
        "a frame of 1 TB": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"]K\x01",
        "a number of 2 GB": b"\x80\x04\x8b\xff\xff\xff\x7fabc.",
        "a number of -1 bytes": b"\x80\x04\x8b\xff\xff\xff\xff.",
        "a million copies of a text": b"\x80\x04" + ENCODE + b"\x94" + _text(10**5)
        + b"\x94\x8c\x06latin1\x86\x94](" + b"h\x00h\x02R" * 50_000 + b"e.",
        "an array of fewer bytes": _reconstruct("f4", b"(K\x7fK\x7ftDTYPE\x89C\x04abcd"),
        "an array of a negative shape": _reconstruct("f4", b"(J\xff\xff\xff\xfftDTYPE\x89C\x04abcd"),
        "an array of a huge shape": _reconstruct(
            "f4", b"(" + _integer(1 << 62) + _integer(4) + b"tDTYPE\x89C\x04abcd"),
        "an array of a huge and an empty side": _reconstruct(
            "f4", b"(" + _integer(1 << 62) + b"K\x00tDTYPE\x89C\x00"),
        "an array of objects by hand": _reconstruct("O", b"K\x01\x85DTYPE\x88](K\x01e"),
        "an array without state": EMPTY + b".",
        "a tensor past its storage": _hostile_tensor(4, (3,), (2,)),
        "a tensor before its storage": _hostile_tensor(4, (3,), (-1,), 2),
        "a tensor with a negative offset": _hostile_tensor(4, (1,), (1,), -1),
        "a tensor of a huge stride": _hostile_tensor(4, (2,), (1 << 61,)),
        "a tensor larger than its storage": _hostile_tensor(4, (1 << 15, 1 << 14), (0, 0)),
        "a storage larger than its bytes": _hostile_tensor(200, (4,), (1,)),
        "a zip archive": b"PK\x03\x04" + b"\0" * 50,
        "nothing": b"",
        "no STOP": pickle.dumps({"a": 1})[:-1],
        "text": b"hello, this is not a pickle",
        "a memo index that was never set": b"\x80\x04Nr\x05\x00\x00\x00j\x04\x00\x00\x00\x86.",
        "a negative memo index": b"Np-1\n.",
        "a reference to a negative memo index": b"Np0\ng-1\n\x86.",
        "a memo index for a mark": b"\x80\x04(\x94N\x86.",
        "only a mark": b"\x80\x04(.",
        "an empty stack": b"\x80\x04R.",
    }  # fmt: skip


@pytest.mark.parametrize("name", list(hostile_pickles("/nowhere")))
def test_hostile_pickle_is_refused_and_runs_nothing(name, tmp_path):
    touched = tmp_path / "touched"
    path = tmp_path / "hostile.pkl"
    path.write_bytes(hostile_pickles(str(touched))[name])
    tracemalloc.start()
    try:
        with pytest.raises(UsageError) as caught:
            load_pickle(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not touched.exists()
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200
    assert peak < 700 << 20


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ("wide laughs", "more bytes than the file"),
        ("a list in itself", "far deeper"),
        ("nested tuples as a key", "a key that is neither text"),
        ("too many instructions", "far more instructions"),
        ("a million copies of a text", "more bytes than the file"),
        ("state set on a constructor", "state of something that is not an array"),
        ("a tensor past its storage", "past its storage"),
        ("a tensor larger than its storage", "larger than its storage"),
        ("a storage larger than its bytes", "shape does not match its bytes"),
        ("an array of objects by hand", "type 'O'"),
        ("os.system", "^refused: the pickle asks for .*system.* never needs"),
        ("builtins.eval", "^refused: the pickle asks for builtins.eval.* never needs"),
    ],
)
def test_attack_is_stopped_by_the_intended_check(attack, message):
    with pytest.raises(PickleRefusedError, match=message):
        loads_pickle(hostile_pickles("x")[attack])


LIMIT_MEMORY = """
import resource, sys, time
from localization_heads.errors import UsageError
from localization_heads.store.safe_pickle import load_pickle
for path in sys.argv[1:]:
    size, before = len(open(path, "rb").read()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    started = time.process_time()
    try:
        print("read", flush=True) if load_pickle(path) else None
    except UsageError as error:
        print(str(error)[len(path):], flush=True)
    assert time.process_time() - started < 5, path
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    assert grown <= 8 * size + (64 << 20), (path, grown)
"""


def test_shared_graphs_are_refused_within_the_memory_limit(tmp_path):
    """In a subprocess, which the first graphs would crash if names were hashed before their type is checked."""
    for number, content in enumerate(GRAPHS.values()):
        (tmp_path / f"{number:02}.pkl").write_bytes(content)
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([sys.executable, "-c", LIMIT_MEMORY, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    messages = dict(zip(GRAPHS, done.stdout.splitlines(), strict=True))
    assert {name: line for name, line in messages.items() if line[:2] != ": " or len(line) > 200} == {}
    assert "whose name is not text" in messages["a name of nested tuples"]
    assert "more bytes than the file" in messages["a list of one array"]


PIECES = {
    "text": lambda i, j, size: _text(size),
    "bytes": lambda i, j, size: b"B" + struct.pack("<I", size) + bytes(size),
    "bytearray": lambda i, j, size: b"\x96" + struct.pack("<Q", size) + bytes(size),
    "number": lambda i, j, size: b"\x8b" + struct.pack("<i", size) + b"\x01" * size,
    "array": lambda i, j, size: _array(size),
    "tensor": lambda i, j, size: _hostile_tensor(4, (2, 2), (2, 1))[2:-1],
    "nest": lambda i, j, size: b")" + b"\x85" * size,
    "list": lambda i, j, size: b"](" + i * size + b"e",
    "pair": lambda i, j, size: i + j + b"\x86",
    "dict": lambda i, j, size: b"}" + i + j + b"s",
    "dicts": lambda i, j, size: b"](" + (b"}" + i + j + b"s") * min(size, 5000) + b"e",
    "append": lambda i, j, size: i + j + b"a",
    "name": lambda i, j, size: i + j + b"\x93",
    "latin1": lambda i, j, size: ENCODE + i + b"\x8c\x06latin1\x86R",
    "storage": lambda i, j, size: _stack_global("torch.storage", "_load_from_bytes") + i + b"\x85R",
    "type": lambda i, j, size: _stack_global("numpy", "dtype") + i + b"\x85R",
    "state": lambda i, j, size: i + j + b"b",
}
"""Code for one value, built from the earlier values `i` and `j`."""


INDEX = st.integers(0, 30)


def _graph(pieces) -> bytes:
    """A list of memoised values, each built from earlier ones."""
    content = b""
    for number, (kind, i, j, size) in enumerate(pieces):
        i, j = (b"j" + struct.pack("<I", n % max(1, number)) for n in (i, j))
        content += PIECES[kind](i, j, size) + b"r" + struct.pack("<I", number)
    return b"\x80\x05](" + content + b"e."


def _unfolded(value) -> int:
    """The size of a value if every reference were a copy."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sys.getsizeof(value) + sum(map(_unfolded, items))


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(PIECES)), INDEX, INDEX, st.sampled_from([0, 1, 300, 20_000])),
        max_size=30,
    )
)
@example([("text", 0, 0, 20_000), ("list", 0, 0, 20_000)])
@example([("array", 0, 0, 20_000), ("list", 0, 0, 20_000)])
@example([("bytearray", 0, 0, 20_000), ("latin1", 0, 0, 0), ("list", 0, 0, 20_000)])
@example([("nest", 0, 0, 20_000), ("name", 0, 0, 0)])
@example([("number", 0, 0, 20_000), ("dicts", 0, 0, 20_000)])
def test_arbitrary_graph_stays_within_its_budget(pieces):
    content = _graph(pieces)
    allowed = 8 * len(content) + (64 << 20)
    tracemalloc.start()
    value, message = None, ""
    try:
        value = loads_pickle(content)
    except PickleRefusedError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < allowed and _unfolded(value) < allowed
    assert "\n" not in message and len(message) < 200


def test_handmade_tensor_without_a_fault_is_read():
    np.testing.assert_array_equal(loads_pickle(_hostile_tensor(4, (2, 2), (2, 1))), np.zeros((2, 2)))


def test_large_memo_index_takes_no_memory():
    """Python's own unpickler would allocate four billion entries here."""
    tracemalloc.start()
    with pytest.raises(PickleRefusedError, match="more bytes than the file"):
        loads_pickle(b"\x80\x04Nr\xff\xff\xff\xff.")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_reading_does_not_modify_constructors():
    """If BUILD could set state on an allowed constructor, it would be compromised for later files."""
    with pytest.raises(PickleRefusedError):
        loads_pickle(hostile_pickles("x")["state set on a constructor"])
    np.testing.assert_array_equal(loads_pickle(pickle.dumps(np.arange(3), protocol=2)), np.arange(3))


def test_every_truncation_is_refused():
    content = pickle.dumps({"attention": np.zeros((1, 1, 2, 2), "f4"), "t": torch.zeros(2)}, protocol=4)
    for end in range(len(content)):
        with pytest.raises(PickleRefusedError):
            loads_pickle(content[:end])


@settings(max_examples=300)
@given(st.data())
def test_corrupted_pickle_is_read_or_refused(data):
    content = bytearray(pickle.dumps({"a": np.arange(3.0), "t": torch.zeros(2), "l": [1, "x"]}, protocol=4))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PickleRefusedError):
        loads_pickle(bytes(content))


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(content):
    with contextlib.suppress(PickleRefusedError):
        loads_pickle(b"\x80\x04" + content)

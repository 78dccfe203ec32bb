"""Reads what `torch.save` wrote, and other pickles, without running anything they ask for.

A pickle names classes and functions to be imported and called. Here each of them becomes an `Inert` look-alike
that only keeps what it was given; the few constructors in `_SAFE` are this module's own or plain builtins. A
tensor becomes a `Stored`: where its bytes lie in the file, never the bytes themselves, so a file of any size is
read at the cost of its directory. Needs neither torch nor the libraries whose objects were pickled.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from tpcheck.errors import TpcheckError, shown

__all__ = ["ITEMSIZE", "Inert", "Stored", "load_archive", "load_pickle", "number"]

ITEMSIZE = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip
_STORAGE = {
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16",
    "IntStorage": "int32", "LongStorage": "int64", "BFloat16Storage": "bfloat16", "HalfStorage": "float16",
    "FloatStorage": "float32", "DoubleStorage": "float64", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": None,
}  # fmt: skip

WRITTEN_OUT = 10_000  # values of a tuple, with those of the tuples in it
_NUMBER = {"float32": "<f", "float64": "<d", "int32": "<i", "int64": "<q"}


def load_pickle(data: bytes, where: str, names: set[str] | None = None) -> Any:
    """The structure of a pickle; objects of classes other than the builtin ones are `Inert`.

    Args:
        names: gets whatever the pickle asks to be imported.
    """
    return _load(data, where, _no_storage, names)


def load_archive(view: memoryview, where: str, names: set[str] | None = None) -> Any:
    """What `torch.save` put into `view`, tensors as `Stored` with positions relative to `view`.

    What is read is held against its CRC-32, if the archive has one.
    """
    try:
        with zipfile.ZipFile(_Window(view)) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        order = bytes(_content(view, entries["byteorder"])[1]) if "byteorder" in entries else b"little"
        data = bytes(_content(view, entries["data.pkl"])[1])
    except Exception as error:  # a broken archive can fail in any way
        raise TpcheckError(
            f"{where} is not what torch.save writes ({shown(error)}): damaged, or not a checkpoint"
        ) from error
    if order != b"little":
        raise TpcheckError(f"{where} was written on a {order.decode(errors='replace')}-endian machine: not supported")

    def storage(key: str) -> tuple[int, int]:
        start, content = _content(view, entries[f"data/{key}"])
        return start, len(content)

    return _load(data, where, storage, names)


def _content(view: memoryview, entry: zipfile.ZipInfo) -> tuple[int, memoryview]:
    """Where an entry's bytes begin in `view`, and they themselves."""
    name = shown(entry.filename.partition("/")[2])
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    header = view[entry.header_offset : entry.header_offset + 30]
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = entry.header_offset + 30 + lengths
    content = view[start : start + entry.file_size]
    if len(content) < entry.file_size:
        raise ValueError(f"{name} is cut short")
    if entry.CRC and zlib.crc32(content) != entry.CRC:  # 0 where torch was told to write none
        raise ValueError(f"the bytes of {name} are not those that were written")
    return start, content


class Inert:
    """Stands for an object or a call that a pickle asked for; keeps its arguments and state, does nothing."""

    qualname = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Not `__init__`, which a pickle of a plain object does not call."""
        made = super().__new__(cls)
        made.args, made.state, made.items = args, kwargs, []
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    def __call__(self, *args: Any) -> Inert:
        return Inert(self, *args)

    def get(self, field: str) -> Any:
        """A field of the object's state, None where it has none of that name."""
        return self.state.get(field) if isinstance(self.state, dict) else None


class Stored(NamedTuple):
    """A tensor in a file: element [i, j, …] starts at byte `position + (i·strides[0] + j·strides[1] + …)·itemsize`."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    position: int


def number(stored: Stored, view: memoryview) -> float:
    """The value of a one-element tensor in `view`."""
    return float(struct.unpack_from(_NUMBER[stored.dtype], view, stored.position)[0])


class _Storage(NamedTuple):
    dtype: str | None
    position: int
    nbytes: int


def _load(data: bytes, where: str, storage: Callable[[str], tuple[int, int]], names: set[str] | None) -> Any:
    unpickler = _Unpickler(io.BytesIO(data), storage)
    try:
        return unpickler.load()
    except Exception as error:  # a broken pickle can fail in any way
        raise TpcheckError(f"{where} can't be read ({shown(error)}): damaged") from error
    finally:
        if names is not None:
            names |= unpickler.names


def _no_storage(key: str) -> tuple[int, int]:
    raise ValueError(f"refers to storage {key}, which a bare pickle has not")


_InPython: Any = pickle._Unpickler


class _Unpickler(_InPython):
    """The unpickler in Python, whose instructions can be overridden: two of them are not harmless as they are.

    A tuple of two references to one such tuple, forty times over, is small in a file, and hashing it, as a key of a
    dict, takes 2^40 steps. BUILD changes what it is applied to, which could be a function of this module.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_InPython.dispatch)

    def __init__(self, file: io.BytesIO, storage: Callable[[str], tuple[int, int]]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage = storage
        self.names: set[str] = set()
        self.sizes: dict[int, int] = {}  # of tuples, written out, by identity
        self.kept: list[Any] = []  # so that no identity is used twice

    def find_class(self, module: str, name: str) -> Any:
        qualname = f"{module}.{name}"
        self.names.add(qualname)
        return _SAFE.get(qualname) or type("Inert", (Inert,), {"qualname": qualname})

    def _bounded(self, made: Any) -> None:
        """Refuse a tuple that stands for more than a file could have written out."""
        size = 1 + sum(self.sizes.get(id(part), 1) for part in made)
        if size > WRITTEN_OUT:
            raise ValueError(f"a tuple of more than {WRITTEN_OUT} values")
        self.sizes[id(made)] = size
        self.kept.append(made)

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, _ = pid
        position, nbytes = self._storage(str(key))
        return _Storage(_STORAGE[kind.qualname.rpartition(".")[2]], position, nbytes)


def _bounding(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def bounded(self: _Unpickler) -> None:
        load(self)
        if type(self.stack[-1]) in (tuple, frozenset):
            self._bounded(self.stack[-1])

    return bounded


def _build(self: _Unpickler) -> None:
    state, made = self.stack.pop(), self.stack[-1]
    if isinstance(made, Inert):
        made.__setstate__(state)
    elif type(made) is not dict:  # an OrderedDict's attributes are not needed
        raise ValueError(f"changes a {type(made).__name__}, which is not its own")


_MAKING: tuple[bytes, ...] = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.FROZENSET)
_MAKING += (pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.OBJ, pickle.INST)
_Unpickler.dispatch |= {code[0]: _bounding(_Unpickler.dispatch[code[0]]) for code in _MAKING}
_Unpickler.dispatch[pickle.BUILD[0]] = _build


def _tensor(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool = False,
    hooks: Any = None,
    last: Any = None,
    metadata: Any = None,
) -> Stored:
    """`_rebuild_tensor_v2(…, metadata)`, or `_rebuild_tensor_v3(…, dtype, metadata)` over an untyped storage."""
    dtype = storage.dtype or last.qualname.rpartition(".")[2]
    if metadata or (storage.dtype and last):
        raise ValueError("a conjugated or negated view")
    if not all(type(size) is int and size >= 0 for size in (*shape, *strides, offset)) or len(shape) != len(strides):
        raise ValueError(f"shape {shown(shape)} with strides {shown(strides)}")
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    if math.prod(shape) and (offset + reach) * ITEMSIZE[dtype] > storage.nbytes:
        raise ValueError(f"a tensor of shape {shown(shape)} reaches beyond its storage of {storage.nbytes} bytes")
    return Stored(dtype, tuple(shape), tuple(strides), storage.position + offset * ITEMSIZE[dtype])


def _first(value: Any, *rest: Any) -> Any:
    return value


_SAFE: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _first,
}


class _Window(io.RawIOBase):
    """A memoryview as a file, without a copy."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")  # as a real file would; zipfile relies on it
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._view[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

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
from collections.abc import Callable
from typing import Any, NamedTuple

from tpcheck.errors import TpcheckError

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

_NUMBER = {"float32": "<f", "float64": "<d", "int32": "<i", "int64": "<q"}


def load_pickle(data: bytes, where: str) -> Any:
    """The structure of a pickle; objects of classes other than the builtin ones are `Inert`."""
    return _load(data, where, _no_storage)


def load_archive(view: memoryview, where: str) -> Any:
    """What `torch.save` put into `view`, tensors as `Stored` with positions relative to `view`."""
    try:
        with zipfile.ZipFile(_Window(view)) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
            data = archive.read(entries["data.pkl"])
    except Exception as error:  # a broken archive can fail in any way
        raise TpcheckError(f"{where} is not what torch.save writes ({error}): damaged, or not a checkpoint") from error
    if order != b"little":
        raise TpcheckError(f"{where} was written on a {order.decode(errors='replace')}-endian machine: not supported")

    def storage(key: str) -> tuple[int, int]:
        entry = entries[f"data/{key}"]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"storage {key} is compressed")
        header = view[entry.header_offset : entry.header_offset + 30]
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + 30 + lengths
        if start + entry.file_size > len(view):
            raise ValueError(f"storage {key} is cut short")
        return start, entry.file_size

    return _load(data, where, storage)


class Inert:
    """Stands for an object or a call that a pickle asked for; keeps its arguments and state, does nothing."""

    qualname = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.state: Any = kwargs
        self.items: list[Any] = []

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


def _load(data: bytes, where: str, storage: Callable[[str], tuple[int, int]]) -> Any:
    try:
        return _Unpickler(io.BytesIO(data), storage).load()
    except Exception as error:  # a broken pickle can fail in any way
        raise TpcheckError(f"{where} can't be read ({type(error).__name__}: {error}): damaged") from error


def _no_storage(key: str) -> tuple[int, int]:
    raise ValueError(f"refers to storage {key}, which a bare pickle has not")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storage: Callable[[str], tuple[int, int]]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        qualname = f"{module}.{name}"
        return _SAFE.get(qualname) or type("Inert", (Inert,), {"qualname": qualname})

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, _ = pid
        position, nbytes = self._storage(str(key))
        return _Storage(_STORAGE[kind.qualname.rpartition(".")[2]], position, nbytes)


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
    if len(shape) != len(strides) or min((*shape, *strides, offset), default=0) < 0:
        raise ValueError(f"shape {shape} with strides {strides}")
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    if math.prod(shape) and (offset + reach) * ITEMSIZE[dtype] > storage.nbytes:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {storage.nbytes} bytes")
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

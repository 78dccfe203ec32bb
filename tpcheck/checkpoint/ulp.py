"""How two tensors of the same dtype and shape differ, element by element, in units in the last place.

A float's bits, read as sign and magnitude, are an integer that grows with the value by one per representable
number, so the distance of two floats in ULPs is the distance of these integers; +0 and -0 are 0 apart, though
their bits differ. A NaN is no distance from anything: it is counted apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tpcheck.checkpoint.unpickle import ITEMSIZE

__all__ = ["FLOATS", "Difference", "compare", "side_by_side", "values"]

Array = npt.NDArray[Any]
PIECE = 4 << 20  # bytes compared at a time

FLOATS = {"bfloat16": "<f4", "float16": "<f2", "float32": "<f4", "float64": "<f8"}  # bfloat16: once widened
SIGNED = ("int8", "int16", "int32", "int64")
UNSIGNED = ("bool", "uint8", "uint16", "uint32", "uint64")


@dataclass(frozen=True)
class Difference:
    """Elements whose bits differ, how many of them are NaN on a side, and the largest distances of the others.

    `max_ulp` is None where only bits can be counted: integers; and with `max_abs` for float8 and complex.
    """

    differing: int
    nan: int
    max_abs: float | None
    max_ulp: int | None


def compare(a: Iterator[memoryview], b: Iterator[memoryview], dtype: str) -> Difference:
    """Compare two streams of the same tensor's bytes, cut into blocks in whatever way."""
    size = ITEMSIZE[dtype]
    bits = f"<u{min(size, 8)}"
    total = Difference(0, 0, None, None)
    for x, y in side_by_side(a, b, (size, size)):
        x_bits, y_bits = np.frombuffer(x, bits), np.frombuffer(y, bits)
        unequal = x_bits != y_bits
        if not unequal.any():
            continue
        if dtype in FLOATS:
            found = _floats(x_bits[unequal], y_bits[unequal], dtype)
        elif dtype in SIGNED or dtype in UNSIGNED:
            apart = _apart(x_bits[unequal], y_bits[unequal], signed=dtype in SIGNED)
            found = Difference(len(apart), 0, float(apart.max()), None)
        else:
            found = Difference(int(unequal.reshape(-1, size // x_bits.itemsize).any(1).sum()), 0, None, None)
        total = _merged(total, found)
    return total


def side_by_side(
    a: Iterator[memoryview], b: Iterator[memoryview], sizes: tuple[int, int]
) -> Iterator[tuple[memoryview, memoryview]]:
    """Pieces of equally many elements, of `sizes` bytes on each side, without a copy, whatever the blocks.

    Raises ValueError when one stream has more elements than the other.
    """
    a, b = filter(len, a), filter(len, b)
    x = y = memoryview(b"")
    while True:
        x, y = x or next(a, x), y or next(b, y)
        elements = min(len(x) // sizes[0], len(y) // sizes[1], PIECE // max(sizes))
        if not elements and (x or y):
            raise ValueError("the streams are not equally long")
        if not elements:
            return
        yield x[: elements * sizes[0]], y[: elements * sizes[1]]
        x, y = x[elements * sizes[0] :], y[elements * sizes[1] :]


def _floats(x_bits: Array, y_bits: Array, dtype: str) -> Difference:
    x, y = values(x_bits, dtype), values(y_bits, dtype)
    numbers = ~(np.isnan(x) | np.isnan(y))
    nan = int(len(x) - numbers.sum())
    if nan == len(x):
        return Difference(len(x), nan, None, None)
    with np.errstate(over="ignore"):
        max_abs = float(np.abs(x[numbers] - y[numbers]).max())
    return Difference(len(x), nan, max_abs, int(_ulps(x_bits[numbers], y_bits[numbers]).max()))


def values(bits: Array, dtype: str) -> Array:
    """The numbers, as float64, that unsigned integers are the bits of; `dtype` is one of `FLOATS`."""
    if dtype == "bfloat16":
        bits = bits.astype("<u4") << np.uint32(16)
    return bits.view(FLOATS[dtype]).astype(np.float64)


def _ulps(x_bits: Array, y_bits: Array) -> Array:
    """Distances as uint64, which holds that of the two infinities in every dtype."""
    sign = np.uint64(1 << (8 * x_bits.itemsize - 1))
    x, y = x_bits.astype(np.uint64), y_bits.astype(np.uint64)
    x_magnitude, y_magnitude = x & ~sign, y & ~sign
    return np.where((x ^ y) & sign, x_magnitude + y_magnitude, _apart(x_magnitude, y_magnitude))


def _apart(x_bits: Array, y_bits: Array, signed: bool = False) -> Array:
    """|x - y| of integers, as uint64; flipping its sign bit makes a signed number an unsigned one in order."""
    flip = x_bits.dtype.type(1 << (8 * x_bits.itemsize - 1) if signed else 0)
    x, y = (x_bits ^ flip).astype(np.uint64), (y_bits ^ flip).astype(np.uint64)
    return np.maximum(x, y) - np.minimum(x, y)


def _merged(a: Difference, b: Difference) -> Difference:
    max_abs = max((m for m in (a.max_abs, b.max_abs) if m is not None), default=None)
    max_ulp = max((m for m in (a.max_ulp, b.max_ulp) if m is not None), default=None)
    return Difference(a.differing + b.differing, a.nan + b.nan, max_abs, max_ulp)

"""A tensor cut into boxes, walked in row-major order, with copies only where a row is in several boxes.

    parts ──► slabs along the first dimension ──► one part, contiguous: handed on as it lies in memory
                                              └─► several parts: rows put together, at most BLOCK bytes at a time

A slab is a range of the first dimension that no part's edge crosses: within it every part has full height.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Index", "Tile", "boxes_of_range", "row_major", "tiles"]

BLOCK = 4 << 20  # large enough that copying costs little beside hashing

Index: TypeAlias = tuple[int, ...]
Array: TypeAlias = npt.NDArray[Any]


class Tile(NamedTuple):
    """The box [offset, offset + array.shape) of a tensor."""

    offset: Index
    array: Array


def row_major(parts: Sequence[Tile]) -> Iterator[Array]:
    """C-contiguous arrays that, flattened one after another, are the tensor that `parts` tile.

    An array is valid only until the next one is asked for.
    """
    if len(parts) == 1 and parts[0].array.flags.c_contiguous:
        yield parts[0].array
        return
    for _, slab in _slabs(parts):
        if len(slab) == 1 and slab[0].array.flags.c_contiguous:
            yield slab[0].array
        else:
            yield from _assembled(slab)


def tiles(parts: Sequence[Tile], shape: Index) -> bool:
    """Whether the parts, none of them empty, cover every element of `shape` exactly once."""
    if len(parts) == 1:
        return parts[0].array.shape == shape and not any(parts[0].offset)
    if not shape or not all(part.array.size for part in parts):
        return False
    covered = 0
    for start, slab in _slabs(parts):
        if start != covered or not tiles([Tile(part.offset[1:], part.array[0]) for part in slab], shape[1:]):
            return False
        covered += len(slab[0].array)
    return covered == shape[0]


def boxes_of_range(shape: Index, start: int, stop: int) -> Iterator[tuple[Index, Index]]:
    """(offset, shape) of the boxes that, in order, make up elements start … stop-1 of a row-major tensor."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: Index, index: int, start: int, stop: int) -> Iterator[tuple[Index, Index]]:
    base = index * math.prod(shape[1:])
    for offset, box in boxes_of_range(shape[1:], start - base, stop - base):
        yield (index, *offset), (1, *box)


def _slabs(parts: Sequence[Tile]) -> Iterator[tuple[int, list[Tile]]]:
    """Start of each slab along dimension 0, and the parts within it, their offsets relative to it."""
    waiting = sorted(parts, key=lambda part: part.offset[0], reverse=True)
    edges = sorted({edge for part in parts for edge in (part.offset[0], part.offset[0] + len(part.array))})
    inside: list[Tile] = []
    for low, high in itertools.pairwise(edges):
        inside = [part for part in inside if part.offset[0] + len(part.array) > low]
        while waiting and waiting[-1].offset[0] <= low:
            inside.append(waiting.pop())
        if inside:
            cut = [(part, low - part.offset[0], high - part.offset[0]) for part in inside]
            yield low, [Tile((0, *part.offset[1:]), part.array[lo:hi]) for part, lo, hi in cut]


def _assembled(slab: Sequence[Tile]) -> Iterator[Array]:
    """The rows of a slab, each put together from its parts, as many at a time as fit into BLOCK bytes."""
    height, first = len(slab[0].array), slab[0].array
    width = [max(part.offset[dim] + part.array.shape[dim] for part in slab) for dim in range(1, first.ndim)]
    rows = BLOCK // (math.prod(width) * first.itemsize)
    if not rows and width:
        for row in range(height):
            yield from row_major([Tile(part.offset[1:], part.array[row]) for part in slab])
        return
    rows = max(1, min(rows, height))
    buffer = np.empty((rows, *width), first.dtype)
    for start in range(0, height, rows):
        block = buffer[: min(rows, height - start)]
        for part in slab:
            box = (slice(low, low + size) for low, size in zip(part.offset[1:], part.array.shape[1:], strict=True))
            columns = (slice(None), *box)
            block[columns] = part.array[start : start + len(block)]
        yield block

"""A logical tensor, put together from the boxes of ranks: its bits, who holds what, and where replicas differ."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tpcheck.checkpoint.tiling import Array, Index
from tpcheck.checkpoint.ulp import FLOATS, values
from tpcheck.checkpoint.unpickle import ITEMSIZE

__all__ = ["Box", "Key", "Logical", "Replicas", "encoded", "in_a_row", "replicas_of", "resolved", "slices_of"]

Box: TypeAlias = tuple[Index, Index]  # offset and size


class Key(NamedTuple):
    """What a logical tensor is known by in every trace."""

    step: int
    kind: str
    name: str


@dataclass(frozen=True)
class Replicas:
    """Ranks that hold the same box with other values than `first`, and how far from it, in norms, the worst is.

    `add_up`: the sum over all ranks that hold it; where a reduction is missing, that is what it should have been.
    """

    first: int
    others: tuple[int, ...]
    distance: float
    add_up: Array = field(repr=False, compare=False)


@dataclass(frozen=True)
class Logical:
    """A tensor as the model has it, as bits; `ranks` says who holds which box, `batch` which dimension is the batch."""

    dtype: str
    bits: Array
    ranks: tuple[tuple[int, tuple[slice, ...]], ...]
    replicas: Replicas | None
    how: tuple[str, ...]
    batch: int | None = None

    @property
    def floats(self) -> bool:
        return self.dtype in FLOATS

    def narrowed(self, dim: int, size: int) -> Logical:
        """The first `size` indices along `dim`; ranks that hold none of them are left out."""

        def first(tensor: Array) -> Array:
            return tensor[(slice(None),) * dim + (slice(size),)]

        clipped = ((rank, (*box[:dim], slice(box[dim].start, min(box[dim].stop, size)), *box[dim + 1 :]))
                   for rank, box in self.ranks)  # fmt: skip
        ranks = tuple((rank, box) for rank, box in clipped if box[dim].start < box[dim].stop)
        replicas = self.replicas and replace(self.replicas, add_up=first(self.replicas.add_up))
        return replace(self, bits=np.ascontiguousarray(first(self.bits)), ranks=ranks, replicas=replicas)

    def summed(self) -> Logical:
        """One number, the sum of all, rounded once."""
        x = self.values().reshape(-1)
        total = math.fsum(x) if np.isfinite(x).all() else x.sum()
        return replace(self, dtype="float64", bits=np.array([total]).view("<u8"), ranks=(), batch=None)

    def widened(self) -> Logical:
        """The same numbers as float64, for a comparison with another dtype."""
        return replace(self, dtype="float64", bits=self.values().view("<u8"))

    def values(self) -> Array:
        return _numbers(self.bits, self.dtype)


def resolved(shape: tuple[int | None, ...], boxes: Iterable[Box]) -> Index:
    """The logical shape, its batch as long as the boxes reach."""
    ends = [max(offset[dim] + size[dim] for offset, size in boxes) for dim in range(len(shape))]
    return tuple(ends[dim] if extent is None else extent for dim, extent in enumerate(shape))


def replicas_of(boxes: dict[Box, list[tuple[int, Array]]], dtype: str, shape: Index) -> Replicas | None:
    """Whether the holders of some box disagree; how much they do where they do most."""
    worst, total = None, np.zeros(shape)
    for place, held in boxes.items():
        (first, reference), *rest = held
        x = _numbers(reference, dtype)
        total[slices_of(*place)] = x + np.sum([_numbers(array, dtype) for _, array in rest], axis=0)
        others = tuple(sorted({rank for rank, array in rest if array.tobytes() != reference.tobytes()}))
        if others:
            norm = np.linalg.norm(x) or 1.0
            distance = max(float(np.linalg.norm(_numbers(array, dtype) - x) / norm) for _, array in rest)
            if worst is None or not distance <= worst.distance:
                worst = Replicas(first, others, distance, total)
    return worst


def _numbers(bits: Array, dtype: str) -> Array:
    return values(bits, dtype) if dtype in FLOATS else bits.astype(np.float64)


def encoded(numbers: Array, dtype: str) -> Array:
    """The bits of `numbers` rounded to `dtype`."""
    if dtype != "bfloat16":
        return numbers.astype(FLOATS[dtype] if dtype != "float16" else "<f2").view(f"<u{ITEMSIZE[dtype]}")
    bits = numbers.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def slices_of(offset: Index, size: Index) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))


def in_a_row(boxes: dict[Box, Any], batch: int) -> dict[Box, Any]:
    """Boxes, each written at its microbatch's number times its own size, one after the other, whatever their sizes."""
    sizes = {offset[batch] // size[batch]: size[batch] for offset, size in boxes if size[batch]}
    starts, start = {}, 0
    for number in sorted(sizes):
        starts[number] = start
        start += sizes[number]
    return {
        ((*offset[:batch], starts[offset[batch] // size[batch]], *offset[batch + 1 :]), size): held
        for (offset, size), held in boxes.items()
        if size[batch]
    }

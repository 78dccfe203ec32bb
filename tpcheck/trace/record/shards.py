"""What a rank holds of a logical tensor: boxes of it, each with its offset, ready to be stored.

    hidden states, sequence parallel      gated fc1 at TP=2                 flat shard of a DP rank
    ┌──────────┐ offset 0                 rank 0 [gate_0│up_0]              ┌────────────┐
    │  rank 0  │                                   │      └──► row 2·n      │   ┌────────┤ rest of a row,
    ├──────────┤ offset s/2                        └─────────► row 0        ├───┴────────┤ whole rows,
    │  rank 1  │                          rank 1 [gate_1│up_1] ► rows n, 3n ├──────┐     │ part of a row
    └──────────┘                                                            └──────┴─────┘

A side of the logical shape that is known only when all microbatches are there is None.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from tpcheck.checkpoint.tiling import Index, boxes_of_range

__all__ = ["Shape", "Shards", "whole"]

Shape: TypeAlias = tuple[int | None, ...]


@dataclass(frozen=True)
class Shards:
    """One rank's boxes of a logical tensor.

    Attributes:
        parts: offset and values of each box.
        how: in words, which dimensions are cut by what; nothing where the tensor is whole.
        partial: the logical tensor is the sum of what the ranks hold.
        scale: what the values are to be multiplied by.
        assumed: nobody said how the tensor is cut; it has been taken for whole.
        alone: it is not known to have a batch, so that every microbatch's is a tensor by itself.
    """

    shape: Shape
    parts: tuple[tuple[Index, torch.Tensor], ...]
    how: tuple[str, ...] = ()
    partial: bool = False
    scale: float = 1.0
    assumed: bool = False
    alone: bool = False

    def cut(self, dim: int, rank: int, size: int, word: str) -> Shards:
        """The same boxes as shard `rank` of `size` equal shards along `dim`."""
        if size == 1:
            return self
        extent = self.shape[dim]
        assert extent is not None
        return self.placed(dim, rank * extent, size * extent, word)

    def placed(self, dim: int, start: int, extent: int, word: str) -> Shards:
        """The same boxes from index `start` of `extent` along `dim`."""
        parts = tuple((_moved(offset, dim, start), part) for offset, part in self.parts)
        return replace(self, shape=_with(self.shape, dim, extent), parts=parts, how=(*self.how, word))

    def gated(self, dim: int, rank: int, size: int) -> Shards:
        """Like `cut`, where every rank holds its shards of two logical halves, one after the other."""
        if size == 1:
            return self
        extent = self.shape[dim]
        assert extent is not None
        half = extent // 2
        parts = tuple(
            (_moved(offset, dim, (which * size + rank) * half), part.narrow(dim, which * half, half))
            for offset, part in self.parts
            for which in range(2)
        )
        return replace(self, shape=_with(self.shape, dim, extent * size), parts=parts, how=(*self.how, "gated"))

    def batch(self, dim: int, index: int) -> Shards:
        """The same boxes as microbatch number `index` of all ranks' along `dim`."""
        extent = self.shape[dim]
        assert extent is not None
        parts = tuple((_moved(offset, dim, index * extent), part) for offset, part in self.parts)
        return replace(self, shape=_with(self.shape, dim, None), parts=parts)

    def flattened(self, values: torch.Tensor, start: int) -> Shards:
        """The boxes that `values` fill: elements `start` and following of these parts, flattened in order."""
        parts: list[tuple[Index, torch.Tensor]] = []
        base = 0
        for offset, part in self.parts:
            low, high = max(start, base), min(start + values.numel(), base + part.numel())
            for inner, box in boxes_of_range(tuple(part.shape), low - base, high - base):
                count = torch.Size(box).numel()
                at = tuple(x + y for x, y in zip(offset, inner, strict=True))
                parts.append((at, values[low - start : low - start + count].view(box)))
                low += count
            base += part.numel()
        return replace(self, parts=tuple(parts), how=(*self.how, "flat over data parallel"))

    def every(self, stride: int) -> Shards:
        """Only the logical indices of the longest dimension that `stride` divides."""
        known = [extent or 0 for extent in self.shape]
        if stride == 1 or not known or max(known) < 2 * stride:
            return self
        dim = known.index(max(known))
        shape = _with(self.shape, dim, -(-known[dim] // stride))
        return replace(self, shape=shape, parts=tuple(_strided(self.parts, dim, stride)))


def whole(tensor: torch.Tensor) -> Shards:
    """All of a logical tensor."""
    return Shards(tuple(tensor.shape), (((0,) * tensor.dim(), tensor),))


def _strided(
    parts: tuple[tuple[Index, torch.Tensor], ...], dim: int, stride: int
) -> Iterator[tuple[Index, torch.Tensor]]:
    for offset, part in parts:
        first = -offset[dim] % stride
        if first < part.shape[dim]:
            kept = part[(slice(None),) * dim + (slice(first, None, stride),)]
            yield (*offset[:dim], (offset[dim] + first) // stride, *offset[dim + 1 :]), kept


def _moved(offset: Index, dim: int, by: int) -> Index:
    dim %= len(offset)
    return (*offset[:dim], offset[dim] + by, *offset[dim + 1 :])


def _with(shape: Shape, dim: int, extent: int | None) -> Shape:
    dim %= len(shape)
    return (*shape[:dim], extent, *shape[dim + 1 :])

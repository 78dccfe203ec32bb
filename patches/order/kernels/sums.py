"""Sums of rows and of columns, in the one order of `pairs`.

    tree_of_sums    leaves of a dimension, each summed by pairs, joined by the contract's tree
    row_sums        one sum over any dimensions

A row's program sums a block of it; of columns, a program takes a block of rows and some neighbouring columns. Blocks
are subtrees: their sums are summed by the same kernels until one is left. Legend: L rows of a leaf, B columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from patches.order.kernels.pairs import LAUNCH, on, pairs, pairs_of_rows, power_of_two, widened
from patches.order.tree import cuts, tree_sum

__all__ = ["row_sums", "sums_of_rows", "tree_of_gamma_gradients", "tree_of_sums"]

ROW_BLOCK = 4096
COLUMNS, LANES, TILES = 128, 8, 8

# What turns summands dy into dy·x̂: x, its rows' mean (None without) and their 1/σ.
Normed = tuple[Tensor, Tensor | None, Tensor]


def tree_of_sums(x: Tensor, dim: int, leaves: int, exact_dims: tuple[int, ...] = ()) -> Tensor:
    """float32 root of the tree over `leaves` sums along `dim`; in a leaf, elements are taken in their logical order."""
    return _tree(x, dim, leaves, exact_dims, None)


def tree_of_gamma_gradients(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, dim: int, leaves: int, exact_dims: tuple[int, ...]
) -> Tensor:
    """The same of dy·x̂, multiplied as they are summed; the last dimension alone is kept."""
    return _tree(dy, dim, leaves, exact_dims, (x, mean, rstd))


def _tree(x: Tensor, dim: int, leaves: int, exact_dims: tuple[int, ...], normed: Normed | None) -> Tensor:
    dim %= x.dim()
    exact = sorted(d % x.dim() for d in exact_dims)
    last = max(dim, *exact) if exact else dim
    kept = [d for d in range(x.dim()) if d != dim and d not in exact]
    shape = [x.shape[d] for d in kept]
    outer, inner = [d for d in exact if d < dim], [d for d in exact if d > dim]
    before, after = [d for d in kept if d < last], [d for d in kept if d > last]
    if not after:
        return tree_sum(row_sums(x.narrow(dim, lo, hi - lo), (dim, *exact)) for lo, hi in cuts(x.shape[dim], leaves))
    if normed is not None:
        normed = (normed[0].contiguous(), normed[1], normed[2])
    rows = x.permute(*before, *outer, dim, *inner, *after).contiguous()
    sizes = [math.prod(x.shape[d] for d in dims) for dims in (before, outer, [dim], inner, after)]
    return tree_sum(_column_sums(rows, sizes, leaves, normed).unbind(1)).view(shape)


def row_sums(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """Σx over `dims`, float32: a function of the summed elements and their logical order alone."""
    summed = sorted(d % x.dim() for d in dims)
    kept = [d for d in range(x.dim()) if d not in summed]
    shape = [1 if d in summed else x.shape[d] for d in range(x.dim()) if keepdim or d not in summed]
    before = [d for d in kept if not summed or d < summed[-1]]
    after = [d for d in kept if d not in before]
    rows = x.permute(*before, *summed, *after).contiguous()
    sizes = [math.prod(x.shape[d] for d in dims) for dims in (before, summed, after)]
    if sizes[2] == 1:
        return sums_of_rows(rows.view(sizes[:2])).view(shape)
    return _column_sums(rows, [sizes[0], 1, sizes[1], 1, sizes[2]], 1).view(shape)


def sums_of_rows(x_RN: Tensor, times_RN: Tensor | None = None) -> Tensor:
    """Σx, or Σx·times, of every row of contiguous operands: float32 [R]."""
    while True:
        rows, n = x_RN.shape
        block = min(power_of_two(n), ROW_BLOCK)
        blocks = max(1, -(-n // block))
        out = torch.zeros(rows, blocks, dtype=torch.float32, device=x_RN.device)
        if x_RN.numel():
            tall = ROW_BLOCK // block
            with on(x_RN):
                _rows[(-(-rows // tall) * blocks,)](
                    x_RN, x_RN if times_RN is None else times_RN, out, rows, n, blocks,
                    PRODUCT=times_RN is not None, ROWS=tall, BLOCK=block, num_warps=4, **LAUNCH,
                )  # fmt: skip
        if blocks == 1:
            return out.view(rows)
        x_RN, times_RN = out, None


@triton.jit(do_not_specialize=["rows", "blocks"])
def _rows(x, y, out, rows, n, blocks, PRODUCT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, blocks]: sums of the blocks of x [rows, n], or of x·y."""
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < n)[None, :]
    at = row[:, None] * n + column[None, :]
    terms = widened(tl.load(x + at, mask=inside, other=0.0))
    if PRODUCT:
        terms *= widened(tl.load(y + at, mask=inside, other=0.0))
    tl.store(out + row * blocks + block, pairs(terms, ROWS, BLOCK) + 0.0, mask=row < rows)


def _column_sums(x: Tensor, sizes: list[int], leaves: int, normed: Normed | None = None) -> Tensor:
    """float32 [A, leaves, B] of contiguous `x`, seen as [A, outer, S, inner, B]; leaves cut S."""
    A, outer, S, inner, B = sizes
    longest = outer * -(-S // leaves) * inner
    rows = power_of_two(longest)
    tiles = min(rows, TILES)
    lanes = min(rows // tiles, LANES)
    columns = min(max(power_of_two(B), 16), COLUMNS)
    blocks = max(1, -(-longest // (tiles * lanes)))
    parts = -(-B // columns)
    out = torch.zeros(A, leaves, blocks, B, dtype=torch.float32, device=x.device)
    z, mean, rstd = normed or (x, None, x)
    if x.numel():
        with on(x):
            _columns[(A * leaves * blocks * parts,)](
                x, z, rstd if mean is None else mean, rstd, out, outer, S, inner, B, leaves, blocks, parts,
                ONE=outer == 1, NORMED=normed is not None, CENTERED=mean is not None,
                LANES=lanes, TILES=tiles, COLUMNS=columns, num_warps=max(1, lanes * columns // 256), **LAUNCH,
            )  # fmt: skip
    if blocks == 1:
        return out.view(A, leaves, B)
    return _column_sums(out, [A * leaves, 1, blocks, 1, B], 1).view(A, leaves, B)


@triton.jit(do_not_specialize=["outer", "S", "inner", "leaves", "blocks", "parts"])
def _columns(
    x, z, mean, rstd, out, outer, S, inner, B, leaves, blocks, parts,
    ONE: tl.constexpr, NORMED: tl.constexpr, CENTERED: tl.constexpr,
    LANES: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [A, leaves, blocks, B]: a block of TILES·LANES rows of a leaf of x [A, outer, S, inner, B]."""
    part = tl.program_id(0) % parts
    block = tl.program_id(0) // parts % blocks
    leaf = tl.program_id(0) // parts // blocks % leaves
    a = (tl.program_id(0) // parts // blocks // leaves).to(tl.int64)
    start = leaf.to(tl.int64) * S // leaves
    width = ((leaf + 1).to(tl.int64) * S // leaves - start).to(tl.int32) * inner
    skipped = a * outer * S * inner + start * inner
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    first = block * (TILES * LANES)
    leaf_rows = (first, outer * width, width, skipped, S * inner)
    total = pairs_of_rows(
        _tiles((x, z, mean, rstd), leaf_rows, columns, B, TILES, TILES, LANES, ONE, NORMED, CENTERED), LANES, COLUMNS
    )
    at = out + ((a * leaves + leaf) * blocks + block) * B + columns
    tl.store(at, total + 0.0, mask=columns < B)


@triton.jit
def _tiles(
    operands, leaf_rows, columns, B, COUNT: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr,
    ONE: tl.constexpr, NORMED: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """[LANES, COLUMNS]: lane i is the sum of rows i·TILES … i·TILES + COUNT - 1 by pairs, which stay in one thread."""
    if COUNT > 1:
        first, n, width, skipped, step = leaf_rows
        HALF: tl.constexpr = COUNT // 2
        left = _tiles(operands, leaf_rows, columns, B, HALF, TILES, LANES, ONE, NORMED, CENTERED)
        later = (first + HALF, n, width, skipped, step)
        right = _tiles(operands, later, columns, B, HALF, TILES, LANES, ONE, NORMED, CENTERED)
        total = left + right
    else:
        total = _terms(operands, leaf_rows, columns, B, TILES, LANES, ONE, NORMED, CENTERED)
    return total


@triton.jit
def _terms(
    operands, leaf_rows, columns, B, TILES: tl.constexpr, LANES: tl.constexpr,
    ONE: tl.constexpr, NORMED: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """Row i of a leaf lies at `skipped + i`, or, where several outer dimensions hold a `width` of it each, beyond."""
    x, z, mean, rstd = operands
    first, n, width, skipped, step = leaf_rows
    i = first + TILES * tl.arange(0, LANES)
    if ONE:
        row = skipped + i
    else:
        row = skipped + (i // tl.maximum(width, 1)).to(tl.int64) * step + i % tl.maximum(width, 1)
    inside = (i < n)[:, None] & (columns < B)[None, :]
    at = row[:, None] * B + columns[None, :]
    terms = widened(tl.load(x + at, mask=inside, other=0.0))
    if NORMED:
        hat = widened(tl.load(z + at, mask=inside, other=0.0))
        if CENTERED:
            hat -= tl.load(mean + row, mask=i < n, other=0.0)[:, None]
        terms *= hat * tl.load(rstd + row, mask=i < n, other=0.0)[:, None]
    return terms

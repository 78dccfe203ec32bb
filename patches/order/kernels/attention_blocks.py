"""What the attention kernels share: where a program stands, which blocks its rows see, how rows come and go.

A band is (offset, left, right).
Legend: M queries, N keys, W the width of a head filled up to a power of two, D its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patches.order.kernels.pairs import INTERPRETED as _INTERPRETED
from patches.order.kernels.pairs import narrowed, widened

__all__ = [
    "base", "dot", "key_blocks", "numbers", "of_head", "place", "query_blocks", "row_of", "rows_of", "seen", "store",
]  # fmt: skip

INTERPRETED = tl.constexpr(_INTERPRETED)


@triton.jit
def place(tiles, heads, starts, lengths, REVERSED: tl.constexpr, PACKED: tl.constexpr):
    """Head, sequence and tile of this program, and of its sequence: first row and length of queries and of keys."""
    tile = tl.program_id(0) % tiles
    if REVERSED:  # if causal, the tiles with most keys begin
        tile = tiles - 1 - tile
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    if PACKED:
        q_starts, q_lengths, k_starts, k_lengths = starts
        place = (
            head, batch, tile, tl.load(q_starts + batch), tl.load(q_lengths + batch), tl.load(k_starts + batch),
            tl.load(k_lengths + batch),
        )  # fmt: skip
    else:
        queries, keys = lengths
        place = (head, batch, tile, 0, queries, 0, keys)
    return place


@triton.jit
def base(x_S, x_B, x_H, batch, start, head, PACKED: tl.constexpr):
    """Where a head of a sequence begins."""
    return head * x_H + (start.to(tl.int64) * x_S if PACKED else batch * x_B)


@triton.jit
def row_of(batch, start, lengths, PACKED: tl.constexpr):
    """The first row of a sequence among all of them."""
    return start.to(tl.int64) if PACKED else batch * lengths[0]


@triton.jit
def of_head(operands, strides, where, repeat, rows, lengths, PACKED: tl.constexpr):
    """Where q, k, v and dy of this program's head and sequence begin, and its first row among `numbers`."""
    q, k, v, dy = operands
    q_SBH, k_SBH, v_SBH, dy_SBH = strides
    head, batch, q_start, k_start = where
    group = head // repeat
    return (
        q + base(q_SBH[0], q_SBH[1], q_SBH[2], batch, q_start, head, PACKED),
        k + base(k_SBH[0], k_SBH[1], k_SBH[2], batch, k_start, group, PACKED),
        v + base(v_SBH[0], v_SBH[1], v_SBH[2], batch, k_start, group, PACKED),
        dy + base(dy_SBH[0], dy_SBH[1], dy_SBH[2], batch, q_start, head, PACKED),
        head * rows.to(tl.int64) + row_of(batch, q_start, lengths, PACKED),
    )  # fmt: skip


@triton.jit
def key_blocks(m, keys, band, LEFT: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr):
    """Keys that a tile's queries see: from a block to the end, and between which blocks all of them see all."""
    offset, left, right = band
    first = offset + m
    end = tl.minimum(keys, first + TILE + right)
    whole = tl.minimum(keys, first + right + 1) // KEYS * KEYS
    start = 0
    full = 0
    if LEFT:
        start = tl.minimum(tl.maximum(first - left, 0), end) // KEYS * KEYS
        full = tl.cdiv(tl.minimum(tl.maximum(first + TILE - 1 - left, 0), end), KEYS) * KEYS
    return start, full, tl.maximum(full, whole), end


@triton.jit
def query_blocks(n, queries, band, LEFT: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr):
    """Likewise the queries that see a tile of keys."""
    offset, left, right = band
    end = queries
    whole = queries // QUERIES * QUERIES
    if LEFT:
        end = tl.minimum(queries, tl.maximum(n + TILE + left - offset, 0))
        whole = tl.minimum(queries, tl.maximum(n + left - offset + 1, 0)) // QUERIES * QUERIES
    start = tl.minimum(tl.maximum(n - right - offset, 0), end) // QUERIES * QUERIES
    full = tl.cdiv(tl.minimum(tl.maximum(n + TILE - 1 - right - offset, 0), end), QUERIES) * QUERIES
    return start, full, tl.maximum(full, whole), end


@triton.jit
def seen(m, n, keys, band, LEFT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Which of M queries see which of N keys."""
    offset, left, right = band
    at = offset + m + tl.arange(0, M)[:, None]
    key = n + tl.arange(0, N)[None, :]
    seen = (key < keys) & (key <= at + right)
    if LEFT:
        seen &= key >= at - left
    return seen


@triton.jit
def rows_of(x, x_S, row, rows, ROWS: tl.constexpr, D: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr):
    """[ROWS, W] of a head, zeros beyond its width and, at an EDGE, beyond `rows`."""
    at_row = row + tl.arange(0, ROWS)
    column = tl.arange(0, W)
    at = x + at_row.to(tl.int64)[:, None] * x_S + column[None, :]
    if EDGE and D < W:
        block = tl.load(at, mask=(at_row < rows)[:, None] & (column < D)[None, :], other=0.0)
    elif EDGE:
        block = tl.load(at, mask=(at_row < rows)[:, None], other=0.0)
    elif D < W:
        block = tl.load(at, mask=(column < D)[None, :], other=0.0)
    else:
        block = tl.load(at)
    return block


@triton.jit
def numbers(top, inverse, delta, m, queries, M: tl.constexpr):
    """What forward left of M queries; beyond the last one zeros, of which p becomes 0."""
    row = m + tl.arange(0, M)
    there = row < queries
    return (
        tl.load(top + row, mask=there, other=0.0), tl.load(inverse + row, mask=there, other=0.0),
        tl.load(delta + row, mask=there, other=0.0),
    )  # fmt: skip


@triton.jit
def store(x, x_MW, x_S, row, rows, ROWS: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Round and store, with every zero +0."""
    at_row = row + tl.arange(0, ROWS)
    column = tl.arange(0, W)
    at = x + at_row.to(tl.int64)[:, None] * x_S + column[None, :]
    tl.store(at, narrowed(x_MW + 0.0, x.dtype.element_ty), mask=(at_row < rows)[:, None] & (column < D)[None, :])


@triton.jit
def dot(x, y, z):
    """x·y + z; the interpreter multiplies bfloat16 wrongly."""
    if INTERPRETED:
        z = tl.dot(widened(x), widened(y), z, input_precision="ieee")
    else:
        z = tl.dot(x, y, z, input_precision="ieee")
    return z

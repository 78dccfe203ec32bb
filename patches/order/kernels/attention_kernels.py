"""The Triton kernels behind `attentions`: every row is a function of its own query and of its own keys alone.

    forward     a program has TILE queries of a head and walks the keys, KEYS at a time, from position 0:
                  s = q·kᵀ    m' = max(m, s)    p = 2^((s - m')·c)    (o | l) = (o | l)·2^((m - m')·c) + p·(v | 1)
    dq          the same walk: p again from m and l, ds = p·(dy·vᵀ - delta), dq += ds·k
    dk, dv      a program has TILE keys of a query head and walks the queries, QUERIES at a time, from query 0

A block that a row sees nothing of leaves the row as it is (its maximum stays, it is scaled by 2^0 = 1, zeros are
added), so it has no say that a tile skips such blocks only where all its rows do, nor how many rows a tile has. The
sum of exponentials, l, is one more column of p·v: rounded p, added in the very order of the products. Tensor cores
add 16 at a time, counted from position 0.

Online softmax: Milakov & Gimelshein, arXiv 1805.02867; tiles and the backward pass: Dao, arXiv 2307.08691.
Legend: M queries, N keys, W the width of a head filled up to a power of two, D its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patches.order.kernels.attention_blocks import (
    base,
    dot,
    key_blocks,
    numbers,
    of_head,
    place,
    query_blocks,
    row_of,
    rows_of,
    seen,
    store,
)
from patches.order.kernels.exponentials import exp2
from patches.order.kernels.pairs import narrowed, pairs, widened

__all__ = ["ONES", "deltas", "forward", "key_gradients", "query_gradient"]

ONES = 16  # columns of ones: the narrowest product of tensor cores
_ONES = tl.constexpr(ONES)
SIZES = ["queries", "keys", "heads", "repeat", "tiles", "rows", "offset", "left", "right"]


@triton.jit(do_not_specialize=SIZES)
def forward(
    q, k, v, y, top, inverse, q_starts, q_lengths, k_starts, k_lengths,
    q_S, q_B, q_H, k_S, k_B, k_H, v_S, v_B, v_H, y_S, y_B, y_H,
    queries, keys, heads, repeat, tiles, rows, offset, left, right, factor,
    PACKED: tl.constexpr, LEFT: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """y of TILE queries of a head, their largest score (0 of none) and 1/Σp (0 of none), float32 [heads, rows]."""
    lengths = (queries, keys)
    starts = (q_starts, q_lengths, k_starts, k_lengths)
    head, batch, tile, q_start, queries, k_start, keys = place(tiles, heads, starts, lengths, True, PACKED)
    m = tile * TILE
    if m < queries:
        band = (offset, left, right)
        q_MW = rows_of(q + base(q_S, q_B, q_H, batch, q_start, head, PACKED), q_S, m, queries, TILE, D, W, True)
        k += base(k_S, k_B, k_H, batch, k_start, head // repeat, PACKED)
        v += base(v_S, v_B, v_H, batch, k_start, head // repeat, PACKED)
        state = (
            tl.zeros((TILE, W), tl.float32), tl.zeros((TILE, _ONES), tl.float32),
            tl.full((TILE,), -float("inf"), tl.float32),
        )  # fmt: skip
        HOW: tl.constexpr = (LEFT, D, W, TILE, KEYS)
        start, full, ragged, end = key_blocks(m, keys, band, LEFT, TILE, KEYS)
        operands = (q_MW, k, v, k_S, v_S, m, keys, band, factor)
        if LEFT:
            state = _walk_keys(state, operands, start, full, True, HOW)
        state = _walk_keys(state, operands, full, ragged, False, HOW)
        o_MW, l_M1, top_M = _walk_keys(state, operands, ragged, end, True, HOW)
        total_M = tl.max(l_M1, axis=1)  # all columns are one
        none = top_M == -float("inf")
        inverse_M = tl.where(none, 0.0, tl.div_rn(1.0, tl.where(none, 1.0, total_M)))
        row = m + tl.arange(0, TILE)
        at = head * rows.to(tl.int64) + row_of(batch, q_start, lengths, PACKED) + row
        tl.store(top + at, tl.where(none, 0.0, top_M), mask=row < queries)
        tl.store(inverse + at, inverse_M, mask=row < queries)
        y += base(y_S, y_B, y_H, batch, q_start, head, PACKED)
        store(y, o_MW * inverse_M[:, None], y_S, m, queries, TILE, D, W)


@triton.jit
def _walk_keys(state, operands, start, end, EDGE: tl.constexpr, HOW: tl.constexpr):
    """Blocks of keys from `start` to `end`; those at an EDGE are hidden from some rows, or end early."""
    LEFT, D, W, TILE, KEYS = HOW
    q_MW, k, v, k_S, v_S, m, keys, band, factor = operands
    o_MW, l_M1, top_M = state
    for n in range(start, end, KEYS):
        k_NW = rows_of(k, k_S, n, keys, KEYS, D, W, EDGE)
        s_MN = dot(q_MW, k_NW.T, tl.zeros((TILE, KEYS), tl.float32))
        if EDGE:
            s_MN = tl.where(seen(m, n, keys, band, LEFT, TILE, KEYS), s_MN, -float("inf"))
        higher_M = tl.maximum(top_M, tl.max(s_MN, axis=1))
        shift_M = tl.where(higher_M == -float("inf"), 0.0, higher_M)  # nothing seen yet
        p_MN = narrowed(exp2((s_MN - shift_M[:, None]) * factor), q_MW.dtype)
        shrink_M = exp2((top_M - shift_M) * factor)
        v_NW = rows_of(v, v_S, n, keys, KEYS, D, W, EDGE)
        l_M1 = dot(p_MN, narrowed(tl.full((KEYS, _ONES), 1.0, tl.float32), q_MW.dtype), l_M1 * shrink_M[:, None])
        o_MW = dot(p_MN, v_NW, o_MW * shrink_M[:, None])
        top_M = higher_M
    return o_MW, l_M1, top_M


@triton.jit(do_not_specialize=["batch", "rows", "heads"])
def deltas(
    y, dy, delta, y_S, y_B, y_H, dy_S, dy_B, dy_H, batch, rows, heads,
    D: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Σ dy·y of every row and head, by pairs, as [heads, rows]; rows are [batch, sequence]."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = (tl.program_id(0) // heads).to(tl.int64) * TILE + tl.arange(0, TILE)
    length = rows // batch
    column = tl.arange(0, W)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at_y = (row // length * y_B + row % length * y_S + head * y_H)[:, None] + column[None, :]
    at_dy = (row // length * dy_B + row % length * dy_S + head * dy_H)[:, None] + column[None, :]
    y_MW = widened(tl.load(y + at_y, mask=inside, other=0.0))
    dy_MW = widened(tl.load(dy + at_dy, mask=inside, other=0.0))
    tl.store(delta + head * rows + row, pairs(y_MW * dy_MW, TILE, W), mask=row < rows)


@triton.jit(do_not_specialize=SIZES)
def query_gradient(
    q, k, v, dy, dq, top, inverse, delta, q_starts, q_lengths, k_starts, k_lengths,
    q_S, q_B, q_H, k_S, k_B, k_H, v_S, v_B, v_H, dy_S, dy_B, dy_H, dq_S, dq_B, dq_H,
    queries, keys, heads, repeat, tiles, rows, offset, left, right, factor, scale,
    PACKED: tl.constexpr, LEFT: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq of TILE queries of a head."""
    lengths = (queries, keys)
    starts = (q_starts, q_lengths, k_starts, k_lengths)
    head, batch, tile, q_start, queries, k_start, keys = place(tiles, heads, starts, lengths, True, PACKED)
    m = tile * TILE
    if m < queries:
        band = (offset, left, right)
        strides = ((q_S, q_B, q_H), (k_S, k_B, k_H), (v_S, v_B, v_H), (dy_S, dy_B, dy_H))
        where = (head, batch, q_start, k_start)
        q, k, v, dy, at = of_head((q, k, v, dy), strides, where, repeat, rows, lengths, PACKED)
        q_MW = rows_of(q, q_S, m, queries, TILE, D, W, True)
        dy_MW = rows_of(dy, dy_S, m, queries, TILE, D, W, True)
        kept = numbers(top + at, inverse + at, delta + at, m, queries, TILE)
        HOW: tl.constexpr = (LEFT, D, W, TILE, KEYS)
        start, full, ragged, end = key_blocks(m, keys, band, LEFT, TILE, KEYS)
        operands = (q_MW, dy_MW, k, v, k_S, v_S, kept, m, keys, band, factor)
        dq_MW = tl.zeros((TILE, W), tl.float32)
        if LEFT:
            dq_MW = _walk_back(dq_MW, operands, start, full, True, HOW)
        dq_MW = _walk_back(dq_MW, operands, full, ragged, False, HOW)
        dq_MW = _walk_back(dq_MW, operands, ragged, end, True, HOW)
        dq += base(dq_S, dq_B, dq_H, batch, q_start, head, PACKED)
        store(dq, dq_MW * scale, dq_S, m, queries, TILE, D, W)


@triton.jit
def _walk_back(dq_MW, operands, start, end, EDGE: tl.constexpr, HOW: tl.constexpr):
    LEFT, D, W, TILE, KEYS = HOW
    q_MW, dy_MW, k, v, k_S, v_S, kept, m, keys, band, factor = operands
    top_M, inverse_M, delta_M = kept
    for n in range(start, end, KEYS):
        k_NW = rows_of(k, k_S, n, keys, KEYS, D, W, EDGE)
        v_NW = rows_of(v, v_S, n, keys, KEYS, D, W, EDGE)
        s_MN = dot(q_MW, k_NW.T, tl.zeros((TILE, KEYS), tl.float32))
        dp_MN = dot(dy_MW, v_NW.T, tl.zeros((TILE, KEYS), tl.float32))
        p_MN = exp2((s_MN - top_M[:, None]) * factor) * inverse_M[:, None]
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        if EDGE:
            ds_MN = tl.where(seen(m, n, keys, band, LEFT, TILE, KEYS), ds_MN, 0.0)
        dq_MW = dot(narrowed(ds_MN, q_MW.dtype), k_NW, dq_MW)
    return dq_MW


@triton.jit(do_not_specialize=SIZES)
def key_gradients(
    q, k, v, dy, dk, dv, top, inverse, delta, q_starts, q_lengths, k_starts, k_lengths,
    q_S, q_B, q_H, k_S, k_B, k_H, v_S, v_B, v_H, dy_S, dy_B, dy_H, dk_S, dk_B, dk_H,
    queries, keys, heads, repeat, tiles, rows, offset, left, right, factor, scale,
    PACKED: tl.constexpr, LEFT: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """What a query head gives dk and dv of TILE keys; dk and dv lie alike, with a head for every query head."""
    lengths = (queries, keys)
    starts = (q_starts, q_lengths, k_starts, k_lengths)
    head, batch, tile, q_start, queries, k_start, keys = place(tiles, heads, starts, lengths, False, PACKED)
    n = tile * TILE
    if n < keys:
        band = (offset, left, right)
        strides = ((q_S, q_B, q_H), (k_S, k_B, k_H), (v_S, v_B, v_H), (dy_S, dy_B, dy_H))
        where = (head, batch, q_start, k_start)
        q, k, v, dy, at = of_head((q, k, v, dy), strides, where, repeat, rows, lengths, PACKED)
        k_NW = rows_of(k, k_S, n, keys, TILE, D, W, True)
        v_NW = rows_of(v, v_S, n, keys, TILE, D, W, True)
        HOW: tl.constexpr = (LEFT, D, W, TILE, QUERIES)
        start, full, ragged, end = query_blocks(n, queries, band, LEFT, TILE, QUERIES)
        operands = (q, dy, k_NW, v_NW, q_S, dy_S, top + at, inverse + at, delta + at, n, queries, keys, band, factor)
        state = (tl.zeros((TILE, W), tl.float32), tl.zeros((TILE, W), tl.float32))
        if W > 128:  # three loops, and what each needs, are more than the registers hold
            dk_NW, dv_NW = _walk_queries(state, operands, start, end, True, HOW)
        else:
            state = _walk_queries(state, operands, start, full, True, HOW)
            state = _walk_queries(state, operands, full, ragged, False, HOW)
            dk_NW, dv_NW = _walk_queries(state, operands, ragged, end, True, HOW)
        at = base(dk_S, dk_B, dk_H, batch, k_start, head, PACKED)
        store(dk + at, dk_NW * scale, dk_S, n, keys, TILE, D, W)
        store(dv + at, dv_NW, dk_S, n, keys, TILE, D, W)


@triton.jit
def _walk_queries(state, operands, start, end, EDGE: tl.constexpr, HOW: tl.constexpr):
    LEFT, D, W, TILE, QUERIES = HOW
    q, dy, k_NW, v_NW, q_S, dy_S, top, inverse, delta, n, queries, keys, band, factor = operands
    dk_NW, dv_NW = state
    for m in range(start, end, QUERIES):
        q_MW = rows_of(q, q_S, m, queries, QUERIES, D, W, EDGE)
        dy_MW = rows_of(dy, dy_S, m, queries, QUERIES, D, W, EDGE)
        top_M, inverse_M, delta_M = numbers(top, inverse, delta, m, queries, QUERIES)
        s_NM = dot(k_NW, q_MW.T, tl.zeros((TILE, QUERIES), tl.float32))
        p_NM = exp2((s_NM - top_M[None, :]) * factor) * inverse_M[None, :]
        if EDGE:
            p_NM = tl.where(seen(m, n, keys, band, LEFT, QUERIES, TILE).T, p_NM, 0.0)
        dv_NW = dot(narrowed(p_NM, k_NW.dtype), dy_MW, dv_NW)
        dp_NM = dot(v_NW, dy_MW.T, tl.zeros((TILE, QUERIES), tl.float32))
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        dk_NW = dot(narrowed(ds_NM, k_NW.dtype), q_MW, dk_NW)
    return dk_NW, dv_NW

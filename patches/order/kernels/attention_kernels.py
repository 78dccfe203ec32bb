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

from patches.order.kernels.exponentials import exp2
from patches.order.kernels.pairs import _INTERPRETED, narrowed, pairs, widened

__all__ = ["ONES", "deltas", "forward", "key_gradients", "query_gradient"]

ONES = 16  # columns of ones: the narrowest product of tensor cores
_ONES = tl.constexpr(ONES)
SIZES = ["queries", "keys", "heads", "repeat", "tiles", "rows", "offset", "left", "right"]


@triton.jit(do_not_specialize=SIZES)
def forward(
    q, k, v, y, top, inverse, q_starts, q_lengths, k_starts, k_lengths,
    q_S, q_B, q_H, k_S, k_B, k_H, v_S, v_B, v_H, y_S, y_B, y_H,
    queries, keys, heads, repeat, tiles, rows, offset, left, right, factor,
    PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """y of TILE queries of a head, their largest score (0 of none) and 1/Σp (0 of none), float32 [heads, rows]."""
    lengths = (queries, keys)
    starts = (q_starts, q_lengths, k_starts, k_lengths)
    head, batch, tile, q_start, queries, k_start, keys = _place(tiles, heads, starts, lengths, RIGHT, PACKED)
    m = tile * TILE
    if m < queries:
        band = (offset, left, right)
        q_MW = _rows(q + _base(q_S, q_B, q_H, batch, q_start, head, PACKED), q_S, m, queries, TILE, D, W, True)
        k += _base(k_S, k_B, k_H, batch, k_start, head // repeat, PACKED)
        v += _base(v_S, v_B, v_H, batch, k_start, head // repeat, PACKED)
        state = (
            tl.zeros((TILE, W), tl.float32), tl.zeros((TILE, _ONES), tl.float32),
            tl.full((TILE,), -float("inf"), tl.float32),
        )  # fmt: skip
        HOW: tl.constexpr = (LEFT, RIGHT, D, W, TILE, KEYS)
        start, full, ragged, end = _key_blocks(m, keys, band, LEFT, RIGHT, TILE, KEYS)
        operands = (q_MW, k, v, k_S, v_S, m, keys, band, factor)
        if LEFT:
            state = _walk_keys(state, operands, start, full, True, HOW)
        state = _walk_keys(state, operands, full, ragged, False, HOW)
        o_MW, l_M1, top_M = _walk_keys(state, operands, ragged, end, True, HOW)
        total_M = tl.max(l_M1, axis=1)  # all columns are one
        none = top_M == -float("inf")
        inverse_M = tl.where(none, 0.0, tl.div_rn(1.0, tl.where(none, 1.0, total_M)))
        row = m + tl.arange(0, TILE)
        at = head * rows.to(tl.int64) + _row_of(batch, q_start, lengths, PACKED) + row
        tl.store(top + at, tl.where(none, 0.0, top_M), mask=row < queries)
        tl.store(inverse + at, inverse_M, mask=row < queries)
        y += _base(y_S, y_B, y_H, batch, q_start, head, PACKED)
        _store(y, o_MW * inverse_M[:, None], y_S, m, queries, TILE, D, W)


@triton.jit
def _walk_keys(state, operands, start, end, EDGE: tl.constexpr, HOW: tl.constexpr):
    """Blocks of keys from `start` to `end`; those at an EDGE are hidden from some rows, or end early."""
    LEFT, RIGHT, D, W, TILE, KEYS = HOW
    q_MW, k, v, k_S, v_S, m, keys, band, factor = operands
    o_MW, l_M1, top_M = state
    for n in range(start, end, KEYS):
        k_NW = _rows(k, k_S, n, keys, KEYS, D, W, EDGE)
        s_MN = _dot(q_MW, k_NW.T, tl.zeros((TILE, KEYS), tl.float32))
        if EDGE:
            s_MN = tl.where(_seen(m, n, keys, band, LEFT, RIGHT, TILE, KEYS), s_MN, -float("inf"))
        higher_M = tl.maximum(top_M, tl.max(s_MN, axis=1))
        shift_M = tl.where(higher_M == -float("inf"), 0.0, higher_M)  # nothing seen yet
        p_MN = narrowed(exp2((s_MN - shift_M[:, None]) * factor), q_MW.dtype)
        shrink_M = exp2((top_M - shift_M) * factor)
        v_NW = _rows(v, v_S, n, keys, KEYS, D, W, EDGE)
        l_M1 = _dot(p_MN, narrowed(tl.full((KEYS, _ONES), 1.0, tl.float32), q_MW.dtype), l_M1 * shrink_M[:, None])
        o_MW = _dot(p_MN, v_NW, o_MW * shrink_M[:, None])
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
    PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq of TILE queries of a head."""
    lengths = (queries, keys)
    starts = (q_starts, q_lengths, k_starts, k_lengths)
    head, batch, tile, q_start, queries, k_start, keys = _place(tiles, heads, starts, lengths, RIGHT, PACKED)
    m = tile * TILE
    if m < queries:
        band = (offset, left, right)
        q_MW = _rows(q + _base(q_S, q_B, q_H, batch, q_start, head, PACKED), q_S, m, queries, TILE, D, W, True)
        dy_MW = _rows(dy + _base(dy_S, dy_B, dy_H, batch, q_start, head, PACKED), dy_S, m, queries, TILE, D, W, True)
        k += _base(k_S, k_B, k_H, batch, k_start, head // repeat, PACKED)
        v += _base(v_S, v_B, v_H, batch, k_start, head // repeat, PACKED)
        at = head * rows.to(tl.int64) + _row_of(batch, q_start, lengths, PACKED)
        numbers = _numbers(top + at, inverse + at, delta + at, m, queries, TILE)
        HOW: tl.constexpr = (LEFT, RIGHT, D, W, TILE, KEYS)
        start, full, ragged, end = _key_blocks(m, keys, band, LEFT, RIGHT, TILE, KEYS)
        operands = (q_MW, dy_MW, k, v, k_S, v_S, numbers, m, keys, band, factor)
        dq_MW = tl.zeros((TILE, W), tl.float32)
        if LEFT:
            dq_MW = _walk_back(dq_MW, operands, start, full, True, HOW)
        dq_MW = _walk_back(dq_MW, operands, full, ragged, False, HOW)
        dq_MW = _walk_back(dq_MW, operands, ragged, end, True, HOW)
        dq += _base(dq_S, dq_B, dq_H, batch, q_start, head, PACKED)
        _store(dq, dq_MW * scale, dq_S, m, queries, TILE, D, W)


@triton.jit
def _walk_back(dq_MW, operands, start, end, EDGE: tl.constexpr, HOW: tl.constexpr):
    LEFT, RIGHT, D, W, TILE, KEYS = HOW
    q_MW, dy_MW, k, v, k_S, v_S, numbers, m, keys, band, factor = operands
    top_M, inverse_M, delta_M = numbers
    for n in range(start, end, KEYS):
        k_NW = _rows(k, k_S, n, keys, KEYS, D, W, EDGE)
        v_NW = _rows(v, v_S, n, keys, KEYS, D, W, EDGE)
        s_MN = _dot(q_MW, k_NW.T, tl.zeros((TILE, KEYS), tl.float32))
        dp_MN = _dot(dy_MW, v_NW.T, tl.zeros((TILE, KEYS), tl.float32))
        p_MN = exp2((s_MN - top_M[:, None]) * factor) * inverse_M[:, None]
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        if EDGE:
            ds_MN = tl.where(_seen(m, n, keys, band, LEFT, RIGHT, TILE, KEYS), ds_MN, 0.0)
        dq_MW = _dot(narrowed(ds_MN, q_MW.dtype), k_NW, dq_MW)
    return dq_MW


@triton.jit(do_not_specialize=SIZES)
def key_gradients(
    q, k, v, dy, dk, dv, top, inverse, delta, q_starts, q_lengths, k_starts, k_lengths,
    q_S, q_B, q_H, k_S, k_B, k_H, v_S, v_B, v_H, dy_S, dy_B, dy_H, dk_S, dk_B, dk_H,
    queries, keys, heads, repeat, tiles, rows, offset, left, right, factor, scale,
    PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """What a query head gives dk and dv of TILE keys; dk and dv lie alike, with a head for every query head."""
    lengths = (queries, keys)
    starts = (q_starts, q_lengths, k_starts, k_lengths)
    head, batch, tile, q_start, queries, k_start, keys = _place(tiles, heads, starts, lengths, False, PACKED)
    n = tile * TILE
    if n < keys:
        band = (offset, left, right)
        k_NW = _rows(k + _base(k_S, k_B, k_H, batch, k_start, head // repeat, PACKED), k_S, n, keys, TILE, D, W, True)
        v_NW = _rows(v + _base(v_S, v_B, v_H, batch, k_start, head // repeat, PACKED), v_S, n, keys, TILE, D, W, True)
        q += _base(q_S, q_B, q_H, batch, q_start, head, PACKED)
        dy += _base(dy_S, dy_B, dy_H, batch, q_start, head, PACKED)
        at = head * rows.to(tl.int64) + _row_of(batch, q_start, lengths, PACKED)
        HOW: tl.constexpr = (LEFT, RIGHT, D, W, TILE, QUERIES)
        start, full, ragged, end = _query_blocks(n, queries, band, LEFT, RIGHT, TILE, QUERIES)
        operands = (q, dy, k_NW, v_NW, q_S, dy_S, top + at, inverse + at, delta + at, n, queries, keys, band, factor)
        state = (tl.zeros((TILE, W), tl.float32), tl.zeros((TILE, W), tl.float32))
        if RIGHT:
            state = _walk_queries(state, operands, start, full, True, HOW)
        state = _walk_queries(state, operands, full, ragged, False, HOW)
        dk_NW, dv_NW = _walk_queries(state, operands, ragged, end, True, HOW)
        at = _base(dk_S, dk_B, dk_H, batch, k_start, head, PACKED)
        _store(dk + at, dk_NW * scale, dk_S, n, keys, TILE, D, W)
        _store(dv + at, dv_NW, dk_S, n, keys, TILE, D, W)


@triton.jit
def _walk_queries(state, operands, start, end, EDGE: tl.constexpr, HOW: tl.constexpr):
    LEFT, RIGHT, D, W, TILE, QUERIES = HOW
    q, dy, k_NW, v_NW, q_S, dy_S, top, inverse, delta, n, queries, keys, band, factor = operands
    dk_NW, dv_NW = state
    for m in range(start, end, QUERIES):
        q_MW = _rows(q, q_S, m, queries, QUERIES, D, W, EDGE)
        dy_MW = _rows(dy, dy_S, m, queries, QUERIES, D, W, EDGE)
        top_M, inverse_M, delta_M = _numbers(top, inverse, delta, m, queries, QUERIES)
        s_NM = _dot(k_NW, q_MW.T, tl.zeros((TILE, QUERIES), tl.float32))
        p_NM = exp2((s_NM - top_M[None, :]) * factor) * inverse_M[None, :]
        if EDGE:
            p_NM = tl.where(_seen(m, n, keys, band, LEFT, RIGHT, QUERIES, TILE).T, p_NM, 0.0)
        dv_NW = _dot(narrowed(p_NM, k_NW.dtype), dy_MW, dv_NW)
        dp_NM = _dot(v_NW, dy_MW.T, tl.zeros((TILE, QUERIES), tl.float32))
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        dk_NW = _dot(narrowed(ds_NM, k_NW.dtype), q_MW, dk_NW)
    return dk_NW, dv_NW


@triton.jit
def _place(tiles, heads, starts, lengths, REVERSED: tl.constexpr, PACKED: tl.constexpr):
    """Head, sequence and tile of this program, and of its sequence: first row and length of queries and of keys."""
    tile = tl.program_id(0) % tiles
    if REVERSED:  # causal: the tiles with most keys begin
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
def _base(x_S, x_B, x_H, batch, start, head, PACKED: tl.constexpr):
    """Where a head of a sequence begins."""
    return head * x_H + (start.to(tl.int64) * x_S if PACKED else batch * x_B)


@triton.jit
def _row_of(batch, start, lengths, PACKED: tl.constexpr):
    """The first row of a sequence among all of them."""
    return start.to(tl.int64) if PACKED else batch * lengths[0]


@triton.jit
def _key_blocks(m, keys, band, LEFT: tl.constexpr, RIGHT: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr):
    """Keys that a tile's queries see: from a block to the end, and between which blocks all of them see all."""
    offset, left, right = band
    first = offset + m
    start = 0
    full = 0
    end = keys
    whole = keys
    if LEFT:
        start = tl.minimum(tl.maximum(first - left, 0), keys) // KEYS * KEYS
        full = tl.maximum(first + TILE - 1 - left, 0)
    if RIGHT:
        end = tl.minimum(keys, first + TILE + right)
        whole = tl.minimum(keys, first + right + 1)
    end = tl.maximum(end, start)
    full = tl.minimum(tl.cdiv(full, KEYS), tl.cdiv(end, KEYS)) * KEYS
    full = tl.maximum(full, start)
    return start, full, tl.maximum(full, whole // KEYS * KEYS), end


@triton.jit
def _query_blocks(n, queries, band, LEFT: tl.constexpr, RIGHT: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr):  # fmt: skip
    """Likewise the queries that see a tile of keys."""
    offset, left, right = band
    start = 0
    full = 0
    end = queries
    whole = queries
    if RIGHT:
        start = tl.minimum(tl.maximum(n - right - offset, 0), queries) // QUERIES * QUERIES
        full = tl.maximum(n + TILE - 1 - right - offset, 0)
    if LEFT:
        end = tl.minimum(queries, tl.maximum(n + TILE + left - offset, 0))
        whole = tl.minimum(queries, tl.maximum(n + left - offset + 1, 0))
    end = tl.maximum(end, start)
    full = tl.minimum(tl.cdiv(full, QUERIES), tl.cdiv(end, QUERIES)) * QUERIES
    full = tl.maximum(full, start)
    return start, full, tl.maximum(full, whole // QUERIES * QUERIES), end


@triton.jit
def _seen(m, n, keys, band, LEFT: tl.constexpr, RIGHT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Which of M queries see which of N keys."""
    offset, left, right = band
    at = offset + m + tl.arange(0, M)[:, None]
    key = n + tl.arange(0, N)[None, :]
    seen = (key < keys) & (at >= 0)
    if LEFT:
        seen &= key >= at - left
    if RIGHT:
        seen &= key <= at + right
    return seen


@triton.jit
def _rows(x, x_S, row, rows, ROWS: tl.constexpr, D: tl.constexpr, W: tl.constexpr, EDGE: tl.constexpr):
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
def _numbers(top, inverse, delta, m, queries, M: tl.constexpr):
    """What forward left of M queries; beyond the last one zeros, of which p becomes 0."""
    row = m + tl.arange(0, M)
    there = row < queries
    return (
        tl.load(top + row, mask=there, other=0.0), tl.load(inverse + row, mask=there, other=0.0),
        tl.load(delta + row, mask=there, other=0.0),
    )  # fmt: skip


@triton.jit
def _store(x, x_MW, x_S, row, rows, ROWS: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Round and store, with every zero +0."""
    at_row = row + tl.arange(0, ROWS)
    column = tl.arange(0, W)
    at = x + at_row.to(tl.int64)[:, None] * x_S + column[None, :]
    tl.store(at, narrowed(x_MW + 0.0, x.dtype.element_ty), mask=(at_row < rows)[:, None] & (column < D)[None, :])


@triton.jit
def _dot(x, y, z):
    """x·y + z; the interpreter multiplies bfloat16 wrongly."""
    if _INTERPRETED:
        z = tl.dot(widened(x), widened(y), z, input_precision="ieee")
    else:
        z = tl.dot(x, y, z, input_precision="ieee")
    return z

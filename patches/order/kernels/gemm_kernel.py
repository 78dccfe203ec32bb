"""The Triton kernel behind `gemm`: every element depends on its own row and column alone.

    one program ─ tiles p, p+P, p+2P, …               P programs share the tiles
                    └─ subtree 0 ─ subtree 1 ─ …       sums above a subtree wait in a float32 scratch buffer,
                         └─ leaves 0, 1 ─ leaves 2, 3   those within it in registers; two leaves share a loop,
                              └─ k step 0 ─ 1 ─ …       each with an accumulator of its own

A loop over all leaves would be one loop to fill with loads, not one per pair of leaves. But an accumulator set to
zero within a loop makes the assembler wait for every wgmma on sm_90 (the static check looks for that). Nothing is
hoisted out of the loops around that over k (`disable_licm`): addresses that are kept over a tile take registers that
pending sums and, on sm_100, four accumulators on their way out of tensor memory need.
Legend: M, N result, K summed, B batch, R rows of an operand, be they M or N.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patches.order import grid

__all__ = ["COUNTS", "kernel"]

UNITS = tl.constexpr(1 / grid.UNIT)  # in 1
WHOLE = tl.constexpr(2.0**23)  # from which on float32 has no fractions
COUNTS = ("steps", "tiles_m", "tiles_n", "tiles")  # arguments whose value no kernel is compiled for


@triton.jit(do_not_specialize=COUNTS)
def kernel(
    a,
    b,
    out,
    scratch,
    scale,
    largest,
    products,
    M,
    N,
    K,
    steps,
    tiles_m,
    tiles_n,
    tiles,
    a_B,
    a_M,
    a_K,
    b_B,
    b_K,
    b_N,
    out_B,
    out_M,
    out_N,
    LEAVES: tl.constexpr,
    PIECES: tl.constexpr,
    TMA: tl.constexpr,
    A_ALONG_K: tl.constexpr,
    B_ALONG_K: tl.constexpr,
    ADD: tl.constexpr,
    IN_UNITS: tl.constexpr,
    SCALED: tl.constexpr,
    VARIES: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    REGISTER_LEVELS: tl.constexpr,
    FLATTEN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """a, b: TMA descriptors or pointers. K: length of a piece. steps: k steps of a leaf's piece.

    scratch: [programs, levels above the registers', TILE_M, TILE_N].
    largest: bits of the largest |a·b| so far, of which an int32 maximum is that of the floats, and NaN's is above all;
        of each of several products.
    products: of several in one launch, int64: first tile, addresses of a, b and out, and M or K, which VARIES says; one
        row each, and after the last the number of tiles. All else they have in common; in units, also `out` if they
        like.
    """
    SUBTREE: tl.constexpr = min(LEAVES, 1 << REGISTER_LEVELS)
    SUBTREES: tl.constexpr = LEAVES // SUBTREE
    LEVELS: tl.constexpr = SUBTREES.bit_length() - 1
    TILE: tl.constexpr = TILE_M * TILE_N
    HOW: tl.constexpr = (LEAVES, PIECES, TMA, A_ALONG_K, B_ALONG_K, WIDEN, TILE_M, TILE_N, TILE_K)
    if LEVELS > 0:
        pending = scratch + tl.cast(tl.program_id(0), tl.int64) * (LEVELS * TILE)
        pending += tl.arange(0, TILE_M)[:, None] * TILE_N + tl.arange(0, TILE_N)[None, :]
    place = 0
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, disable_licm=True):
        # Tiles that run at the same time share rows and columns: GROUP rows of tiles at a time, column by column.
        a_here, b_here, out_here, M_here, K_here, steps_here, tiles_m_here = a, b, out, M, K, steps, tiles_m
        if VARIES != "":
            while tile >= tl.load(products + (place + 1) * 5):
                place += 1
            product = products + place * 5
            a_here, b_here, out_here = _addresses(product, a, out, ALIGNED)
            if VARIES == "M":
                M_here = tl.load(product + 4).to(tl.int32)
                tiles_m_here = tl.cdiv(M_here, TILE_M)
            else:
                K_here = tl.load(product + 4).to(tl.int32)
                steps_here = tl.cdiv(K_here, TILE_K)
            batch, in_batch = 0, tile - tl.load(product).to(tl.int32)
        else:
            batch = tile // (tiles_m * tiles_n)
            in_batch = tile % (tiles_m * tiles_n)
        first = in_batch // (GROUP * tiles_n) * GROUP
        in_group = in_batch % (GROUP * tiles_n)
        height = min(tiles_m_here - first, GROUP)
        m = (first + in_group % height) * TILE_M
        n = in_group // height * TILE_N
        operands = (a_here, b_here, batch, m, n, M_here, N, K_here, (a_B, a_M, a_K), (b_B, b_N, b_K))
        root = tl.zeros((TILE_M, TILE_N), tl.float32)
        for subtree in tl.range(0, SUBTREES, disable_licm=True):
            root = _subtree(operands, steps_here, subtree * SUBTREE, SUBTREE, HOW)
            if LEVELS > 0:
                # A binary counter: the trailing ones of `subtree` are the levels that this subtree completes.
                level = 0
                while (subtree >> level) & 1 != 0:
                    root = tl.load(pending + level * TILE) + root
                    level += 1
                if subtree != SUBTREES - 1:
                    tl.store(pending + level * TILE, root)
                tl.debug_barrier()  # another thread may be the one that reads, or next writes, an element
        if SCALED:
            root = (root + 0.0) * scale  # a root's zeros are +0
        if IN_UNITS:
            tl.atomic_max(largest + place, tl.max(tl.abs(root).to(tl.int32, bitcast=True)), sem="relaxed")
        HOW_KEPT: tl.constexpr = (ADD, IN_UNITS, SCALED, VARIES != "")
        out_here += tl.cast(batch, tl.int64) * out_B
        _store(root, out_here, m, n, M_here, N, out_M, out_N, HOW_KEPT, TILE_M, TILE_N)


@triton.jit
def _addresses(product, a, out, ALIGNED: tl.constexpr):
    """Of a product's operands and result, in the dtypes of `a` and `out`."""
    a_here = tl.load(product + 1).to(tl.pointer_type(a.dtype.element_ty))
    b_here = tl.load(product + 2).to(tl.pointer_type(a.dtype.element_ty))
    out_here = tl.load(product + 3).to(tl.pointer_type(out.dtype.element_ty))
    if ALIGNED:
        a_here, b_here, out_here = tl.multiple_of(a_here, 16), tl.multiple_of(b_here, 16), tl.multiple_of(out_here, 16)
    return a_here, b_here, out_here


@triton.jit
def _store(
    root, out, m, n, M, N, out_M, out_N, HOW: tl.constexpr, TILE_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Round and store, or add, some columns at a time: what addresses and old values take is registers."""
    ADD, IN_UNITS, SCALED, GROUPED = HOW
    if COLUMNS > (16 if IN_UNITS else 64):
        HALF: tl.constexpr = COLUMNS // 2
        left, right = root.reshape(TILE_M, 2, HALF).permute(0, 2, 1).split()
        _store(left, out, m, n, M, N, out_M, out_N, HOW, TILE_M, HALF)
        _store(right, out, m, n + HALF, M, N, out_M, out_N, HOW, TILE_M, HALF)
    else:
        rows = m + tl.arange(0, TILE_M)
        columns = n + tl.arange(0, COLUMNS)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        at = out + rows.to(tl.int64)[:, None] * out_M + columns.to(tl.int64)[None, :] * out_N
        if IN_UNITS and GROUPED:
            tl.atomic_add(at, _in_units(root), mask=inside, sem="relaxed")  # integers come in any order
        elif IN_UNITS:
            tl.store(at, tl.load(at, mask=inside) + _in_units(root), mask=inside)
        elif ADD:
            tl.store(at, tl.load(at, mask=inside) + root, mask=inside)
        elif SCALED:
            tl.store(at, root.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(at, root.to(out.dtype.element_ty) + 0.0, mask=inside)


@triton.jit
def _in_units(x):
    """Whole units, halves to even, int64; no double precision, of which some GPUs have next to none."""
    size = tl.abs(x) * UNITS
    whole = tl.where(size < WHOLE, (size + WHOLE) - WHOLE, size).to(tl.int64)
    return tl.where(x < 0, -whole, whole)


@triton.jit
def _subtree(operands, steps, leaf, SUBTREE: tl.constexpr, HOW: tl.constexpr):
    """Root of the tree over SUBTREE leaves from `leaf` on; what is pending stays in registers."""
    if SUBTREE > 2:
        HALF: tl.constexpr = SUBTREE // 2
        left = _subtree(operands, steps, leaf, HALF, HOW)
        right = _subtree(operands, steps, leaf + HALF, HALF, HOW)
        root = left + right
    else:
        root = _leaves(operands, steps, leaf, SUBTREE, HOW)
    return root


@triton.jit
def _leaves(operands, steps, leaf, COUNT: tl.constexpr, HOW: tl.constexpr):
    """A leaf, or two side by side, so that loads run dry half as often: k in order, TILE_K at a time.

    Returns float32 [TILE_M, TILE_N]. A ragged end is filled with zeros.
    """
    _, PIECES, _, _, _, _, TILE_M, TILE_N, _ = HOW
    left = tl.zeros((TILE_M, TILE_N), tl.float32)
    right = tl.zeros((TILE_M, TILE_N), tl.float32)
    for step in range(PIECES * steps):
        x_MK, y_KN = _step(operands, steps, leaf, step, HOW)
        left = tl.dot(x_MK, y_KN, left, input_precision="ieee")
        if COUNT == 2:
            x_MK, y_KN = _step(operands, steps, leaf + 1, step, HOW)
            right = tl.dot(x_MK, y_KN, right, input_precision="ieee")
    return left + right if COUNT == 2 else left


@triton.jit
def _step(operands, steps, leaf, step, HOW: tl.constexpr):
    """[TILE_M, TILE_K] and [TILE_K, TILE_N] of a leaf's k step; its gate comes before its up."""
    a, b, batch, m, n, M, N, K, a_strides, b_strides = operands
    LEAVES, PIECES, TMA, A_ALONG_K, B_ALONG_K, WIDEN, TILE_M, TILE_N, TILE_K = HOW
    piece = step // steps if PIECES > 1 else 0
    k = (step - piece * steps) * TILE_K
    if TMA:
        x_MK = _block(a, batch, piece * LEAVES + leaf, m, k, A_ALONG_K, TILE_M, TILE_K)
        y_NK = _block(b, batch, piece * LEAVES + leaf, n, k, B_ALONG_K, TILE_N, TILE_K)
    else:
        start = tl.cast(tl.cast(leaf, tl.int64) * K // LEAVES, tl.int32)
        end = tl.cast(tl.cast(leaf + 1, tl.int64) * K // LEAVES, tl.int32)
        x_MK = _masked_block(a, batch, m, M, start + k, end, piece * K, a_strides, TILE_M, TILE_K)
        y_NK = _masked_block(b, batch, n, N, start + k, end, piece * K, b_strides, TILE_N, TILE_K)
    if WIDEN:
        x_MK = _widened(x_MK)
        y_NK = _widened(y_NK)
    return x_MK, y_NK.T


@triton.jit
def _block(x, batch, leaf, row, k, ALONG_K: tl.constexpr, ROWS: tl.constexpr, TILE_K: tl.constexpr):
    """[ROWS, TILE_K] of a leaf by TMA, which fills with zeros what is beyond the leaf or the rows."""
    if ALONG_K:
        block = x.load([batch, leaf, row, k]).reshape(ROWS, TILE_K)
    else:
        block = x.load([batch, leaf, k, row]).reshape(TILE_K, ROWS).T
    return block


@triton.jit
def _masked_block(x, batch, row, rows, k, end, skip, strides, ROWS: tl.constexpr, TILE_K: tl.constexpr):
    """[ROWS, TILE_K] of any strides; zeros beyond `rows` and the leaf's `end`."""
    stride_B, stride_R, stride_K = strides
    at_row = row + tl.arange(0, ROWS)
    at_k = k + tl.arange(0, TILE_K)
    at = x + tl.cast(batch, tl.int64) * stride_B + tl.cast(skip, tl.int64) * stride_K
    at += at_row.to(tl.int64)[:, None] * stride_R + at_k.to(tl.int64)[None, :] * stride_K
    return tl.load(at, mask=(at_row < rows)[:, None] & (at_k < end)[None, :], other=0.0)


@triton.jit
def _widened(x):
    """bfloat16 as float32, bit by bit: the interpreter's own product and conversion of bfloat16 are wrong."""
    return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)

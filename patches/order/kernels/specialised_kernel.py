"""The Gluon kernel behind `specialised`: a tree of 2 to 8 leaves by warps that have parts of their own.

    loads       one warp        k steps, leaf after leaf, tile after tile, by TMA into STAGES buffers as they are freed
    multiplies  sm_90: the two warpgroups that add, by wgmma into registers
                sm_100: one warp, by tcgen05.mma into ACCUMULATORS of tensor memory
    adds        two warpgroups  pairs of leaves in registers, above them in scratch; stores

So loads never run dry between leaves or tiles, as those of `gemm_kernel` do; on sm_100 a tile is added and stored while
the next one is multiplied. The bits are `gemm_kernel`'s: groups of 16 of K from a leaf's start, leaves by the tree, and
a leaf's first product starts an accumulator.
Legend: M, N result, K summed, R rows of an operand, be they M or N.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import blackwell
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from patches.order.kernels.gemm_kernel import COUNTS

__all__ = ["kernel"]


@gluon.jit(do_not_specialize=COUNTS)
def kernel(
    a,
    b,
    out,
    scratch,
    M,
    N,
    steps,
    tiles_m,
    tiles_n,
    tiles,
    out_M,
    LEAVES: gl.constexpr,
    PIECES: gl.constexpr,
    B_ALONG_K: gl.constexpr,
    WGMMA: gl.constexpr,
    TILE_M: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
    ACCUMULATORS: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """a, b: descriptors of [parts, M, K of a part], and of [parts, N, K of a part] or with the last two swapped.

    steps: k steps of a leaf's piece. scratch: [programs, levels above a pair, TILE_M, TILE_N].
    """
    HOW: gl.constexpr = (LEAVES, PIECES, B_ALONG_K, WGMMA, TILE_M, TILE_N, TILE_K, STAGES, ACCUMULATORS, GROUP)
    sizes = (M, N, steps, tiles_m, tiles_n, tiles)
    a_slots = gl.allocate_shared_memory(a.dtype, [STAGES, 1, TILE_M, TILE_K], a.layout)
    b_slots = gl.allocate_shared_memory(
        b.dtype, [STAGES, 1, TILE_N, TILE_K] if B_ALONG_K else [STAGES, 1, TILE_K, TILE_N], b.layout
    )
    operands = (a_slots, b_slots, _barriers(STAGES), _barriers(STAGES))
    if WGMMA:
        fragment: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_N, 16])
        gl.warp_specialize(
            [
                (_add, (out, scratch, operands, sizes, out_M, fragment, HOW, WARPS)),
                (_load, (a, b, operands, sizes, HOW)),
            ],
            [1],
            [24],
        )
    else:
        columns: gl.constexpr = blackwell.TensorMemoryLayout((TILE_M, TILE_N), col_stride=1)
        rows: gl.constexpr = blackwell.get_tmem_reg_layout(gl.float32, (TILE_M, TILE_N), columns, WARPS)
        memory = blackwell.allocate_tensor_memory(gl.float32, [ACCUMULATORS, TILE_M, TILE_N], columns)
        leaves = (memory, _barriers(ACCUMULATORS), _barriers(ACCUMULATORS))
        gl.warp_specialize(
            [
                (_add, (out, scratch, leaves, sizes, out_M, rows, HOW, WARPS)),
                (_load, (a, b, operands, sizes, HOW)),
                (_multiply, (operands, leaves, sizes, HOW)),
            ],
            [1, 1],
            [24, 24],
        )


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    """COUNT barriers of one arrival each, which TMA and the tensor core see."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    fence_async_shared()
    return barriers


@gluon.jit
def _next(slot, phase, SLOTS: gl.constexpr):
    """The slot after this one; a barrier's phase is over when its parity is `phase`, which changes every round."""
    slot += 1
    if slot == SLOTS:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def _before(slot, SLOTS: gl.constexpr):
    """The slot before this one. Not kept in a variable: Triton's loops do not carry one that began as `slot` itself."""
    return (slot + SLOTS - 1) % SLOTS


@gluon.jit
def _place(tile, sizes, HOW: gl.constexpr):
    """First row and column of a tile: GROUP rows of tiles at a time, column by column."""
    _, _, _, _, TILE_M, TILE_N, _, _, _, GROUP = HOW
    _, _, _, tiles_m, tiles_n, _ = sizes
    first = tile // (GROUP * tiles_n) * GROUP
    in_group = tile % (GROUP * tiles_n)
    height = gl.minimum(tiles_m - first, GROUP)
    return (first + in_group % height) * TILE_M, in_group // height * TILE_N


@gluon.jit
def _load(a, b, operands, sizes, HOW: gl.constexpr):
    """Every k step of every leaf; TMA fills with zeros what is beyond a leaf, the rows or the columns."""
    LEAVES, PIECES, B_ALONG_K, _, TILE_M, TILE_N, TILE_K, STAGES, _, _ = HOW
    a_slots, b_slots, ready, free = operands
    _, _, steps, _, _, tiles = sizes
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = _place(tile, sizes, HOW)
        for leaf in range(LEAVES):
            for step in range(PIECES * steps):
                piece = step // steps if PIECES > 1 else 0
                k = (step - piece * steps) * TILE_K
                part = piece * LEAVES + leaf
                mbarrier.wait(free.index(slot), phase ^ 1)  # at once in the first round
                mbarrier.expect(ready.index(slot), (TILE_M + TILE_N) * TILE_K * 2)
                tma.async_copy_global_to_shared(a, [part, m, k], ready.index(slot), a_slots.index(slot))
                if B_ALONG_K:
                    tma.async_copy_global_to_shared(b, [part, n, k], ready.index(slot), b_slots.index(slot))
                else:
                    tma.async_copy_global_to_shared(b, [part, k, n], ready.index(slot), b_slots.index(slot))
                slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _blocks(a_slots, b_slots, slot, HOW: gl.constexpr):
    """[TILE_M, TILE_K] and [TILE_K, TILE_N] of a buffer."""
    _, _, B_ALONG_K, _, TILE_M, TILE_N, TILE_K, _, _, _ = HOW
    x_MK = a_slots.index(slot).reshape([TILE_M, TILE_K])
    if B_ALONG_K:
        y_KN = b_slots.index(slot).reshape([TILE_N, TILE_K]).permute([1, 0])
    else:
        y_KN = b_slots.index(slot).reshape([TILE_K, TILE_N])
    return x_MK, y_KN


@gluon.jit
def _multiply(operands, leaves, sizes, HOW: gl.constexpr):
    """tcgen05: every leaf into an accumulator; a product that is done frees its buffer, a leaf's last one tells."""
    LEAVES, PIECES, _, _, _, _, _, STAGES, ACCUMULATORS, _ = HOW
    a_slots, b_slots, ready, free = operands
    memory, done, taken = leaves
    _, _, steps, _, _, tiles = sizes
    slot = 0
    phase = 0
    into = 0
    rounds = 0
    for _tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for _leaf_of_tile in range(LEAVES):
            mbarrier.wait(taken.index(into), rounds ^ 1)
            for step in range(PIECES * steps):
                mbarrier.wait(ready.index(slot), phase)
                x_MK, y_KN = _blocks(a_slots, b_slots, slot, HOW)
                blackwell.tcgen05_mma(x_MK, y_KN, memory.index(into), use_acc=step > 0, mbarriers=[free.index(slot)])
                slot, phase = _next(slot, phase, STAGES)
            blackwell.tcgen05_commit(done.index(into))
            into, rounds = _next(into, rounds, ACCUMULATORS)


@gluon.jit
def _leaf(source, steps, slot, phase, layout: gl.constexpr, HOW: gl.constexpr):
    """float32 [TILE_M, TILE_N] of the next leaf, and what comes after it; wgmma: multiplied here."""
    _, PIECES, _, WGMMA, TILE_M, TILE_N, _, STAGES, ACCUMULATORS, _ = HOW
    if WGMMA:
        a_slots, b_slots, ready, free = source
        acc = warpgroup_mma_init(gl.zeros((TILE_M, TILE_N), gl.float32, layout))
        for step in range(PIECES * steps):
            mbarrier.wait(ready.index(slot), phase)
            x_MK, y_KN = _blocks(a_slots, b_slots, slot, HOW)
            acc = warpgroup_mma(x_MK, y_KN, acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            mbarrier.arrive(free.index(_before(slot, STAGES)), pred=step > 0)
            slot, phase = _next(slot, phase, STAGES)
        root = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index(_before(slot, STAGES)))
    else:
        memory, done, taken = source
        mbarrier.wait(done.index(slot), phase)
        root = memory.index(slot).load(layout)
        mbarrier.arrive(taken.index(slot))
        slot, phase = _next(slot, phase, ACCUMULATORS)
    return root, slot, phase


@gluon.jit
def _add(out, scratch, source, sizes, out_M, layout: gl.constexpr, HOW: gl.constexpr, WARPS: gl.constexpr):
    """The tree over a tile's leaves, and its root into `out`."""
    LEAVES, _, _, _, TILE_M, TILE_N, _, _, _, _ = HOW
    PAIRS: gl.constexpr = LEAVES // 2
    TILE: gl.constexpr = TILE_M * TILE_N
    M, N, steps, _, _, tiles = sizes
    rows = gl.arange(0, TILE_M, gl.SliceLayout(1, layout))
    columns = gl.arange(0, TILE_N, gl.SliceLayout(0, layout))
    if PAIRS > 1:
        pending = scratch + gl.program_id(0).to(gl.int64) * ((PAIRS.bit_length() - 1) * TILE)
        pending += rows[:, None] * TILE_N + columns[None, :]
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = _place(tile, sizes, HOW)
        root = gl.zeros((TILE_M, TILE_N), gl.float32, layout)
        for pair in range(PAIRS):
            left, slot, phase = _leaf(source, steps, slot, phase, layout, HOW)
            right, slot, phase = _leaf(source, steps, slot, phase, layout, HOW)
            root = left + right
            if PAIRS > 1:
                # A binary counter, as in `gemm_kernel`; the thread that reads an element is the one that wrote it.
                level = 0
                while (pair >> level) & 1 != 0:
                    root = gl.load(pending + level * TILE) + root
                    level += 1
                if pair != PAIRS - 1:
                    gl.store(pending + level * TILE, root)
        _store(root, out, m, n, M, N, out_M, layout, TILE_M, TILE_N, WARPS)


@gluon.jit
def _store(
    root, out, m, n, M, N, out_M,
    layout: gl.constexpr, TILE_M: gl.constexpr, TILE_N: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Rounded once, zeros as +0; by way of shared memory, so that a warp writes whole lines."""
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    rounded = gl.convert_layout(root.to(out.dtype.element_ty) + 0.0, lines)
    rows = m + gl.arange(0, TILE_M, gl.SliceLayout(1, lines))
    columns = n + gl.arange(0, TILE_N, gl.SliceLayout(0, lines))
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    gl.store(out + rows.to(gl.int64)[:, None] * out_M + columns[None, :], rounded, mask=inside)

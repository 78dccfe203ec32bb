"""Cross-entropy whose softmax is computed again for backward: sums of exponentials by pairs, of rows of any length.

    chunks of CHUNK    (maximum m_c, sum s_c of exp(z - m_c)) of each in one pass over the row
    a row              M = max m_c,  S = Σ s_c·exp(m_c - M) by pairs

A vocabulary's leaves are cut into chunks one by one, so that a leaf's share of S does not depend on who holds it.
Maxima are exact in any order. Legend: R rows, V columns of a row, L leaves, C chunks of a leaf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patches.order.kernels.exponentials import exp, log
from patches.order.kernels.pairs import LAUNCH, narrowed, on, pairs, power_of_two, widened

__all__ = ["CHUNK", "exponentials", "joined", "logits_gradient", "losses"]

CHUNK = 4096
TILE = 4096


def exponentials(z_RV: Tensor, leaves: int) -> tuple[Tensor, Tensor]:
    """Maximum m of every chunk of every leaf, and its sum of exp(z - m): float32 [R, L, C] each."""
    z_RV = z_RV.contiguous()
    rows, columns = z_RV.shape
    longest = -(-columns // leaves)
    chunks = -(-longest // CHUNK)
    tops = torch.empty(rows, leaves, chunks, dtype=torch.float32, device=z_RV.device)
    sums = torch.empty_like(tops)
    if tops.numel():
        with on(z_RV):
            _exponentials[(tops.numel(),)](
                z_RV, tops, sums, columns, leaves, chunks,
                ALIGNED=columns % (16 * leaves) == 0, CHUNK=min(CHUNK, power_of_two(longest)), num_warps=8, **LAUNCH,
            )  # fmt: skip
    return tops, sums


def joined(tops_RLC: Tensor, sums_RLC: Tensor, top_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rows' maximum M, and Σ s·exp(m - M), the tree over chunks and leaves: float32 [R].

    Args:
        top_R: M where it is another one, that of all ranks.
    """
    rows, leaves, chunks = tops_RLC.shape
    top_R = tops_RLC.amax((1, 2)) if top_R is None else top_R
    total = torch.empty_like(top_R)
    padded = power_of_two(chunks)
    tall = max(1, 1024 // (power_of_two(leaves) * padded))
    if rows:
        with on(total):
            _joined[(-(-rows // tall),)](
                tops_RLC, sums_RLC, top_R, total, rows, leaves, chunks,
                ROWS=tall, LEAVES=power_of_two(leaves), CHUNKS=padded, num_warps=4, **LAUNCH,
            )  # fmt: skip
    return top_R, total


def losses(top_R: Tensor, total_R: Tensor, picked_R: Tensor) -> Tensor:
    """log S - (z_target - M): float32 [R]."""
    top_R, total_R, picked_R = (x.contiguous() for x in (top_R, total_R, picked_R))
    loss = torch.empty_like(total_R)
    if loss.numel():
        with on(loss):
            _losses[(-(-loss.numel() // TILE),)](
                top_R, total_R, picked_R, loss, loss.numel(), BLOCK=TILE, num_warps=8, **LAUNCH
            )
    return loss


def logits_gradient(z_RV: Tensor, target_R: Tensor, top_R: Tensor, total_R: Tensor, dloss_R: Tensor) -> Tensor:
    """(softmax - one-hot)·dloss in the dtype of the logits; a target that is no column of theirs hits none."""
    z_RV = z_RV.contiguous()
    rows, columns = z_RV.shape
    dz = torch.empty_like(z_RV)
    if dz.numel():
        blocks = -(-columns // TILE)
        with on(z_RV):
            _logits_gradient[(rows * blocks,)](
                z_RV, target_R, top_R, total_R, dloss_R.float().contiguous(), dz, columns, blocks,
                BLOCK=TILE, num_warps=8, **LAUNCH,
            )  # fmt: skip
    return dz


@triton.jit(do_not_specialize=["leaves", "chunks"])
def _exponentials(z, tops, sums, columns, leaves, chunks, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0) % chunks
    leaf = tl.program_id(0) // chunks % leaves
    row = (tl.program_id(0) // chunks // leaves).to(tl.int64)
    start = leaf.to(tl.int64) * columns // leaves
    end = (leaf + 1).to(tl.int64) * columns // leaves
    if ALIGNED:  # for loads of 16 bytes
        start = tl.multiple_of(start, 16)
        end = tl.multiple_of(end, 16)
    column = start + chunk * CHUNK + tl.arange(0, CHUNK)
    values = widened(tl.load(z + row * columns + column, mask=column < end, other=-float("inf")))
    top = tl.max(values, axis=0)
    shift = tl.where(top == -float("inf"), 0.0, top)  # nothing but -∞: the sum is 0
    terms = tl.reshape(exp(values - shift), [1, CHUNK])
    one = tl.program_id(0) + tl.arange(0, 1)
    tl.store(tops + one, top)
    tl.store(sums + one, pairs(terms, 1, CHUNK))


@triton.jit(do_not_specialize=["rows", "leaves", "chunks"])
def _joined(
    tops, sums, top, total, rows, leaves, chunks, ROWS: tl.constexpr, LEAVES: tl.constexpr, CHUNKS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, LEAVES * CHUNKS)
    leaf = part // CHUNKS
    chunk = part % CHUNKS
    inside = (row < rows)[:, None] & ((leaf < leaves) & (chunk < chunks))[None, :]
    at = row[:, None] * (leaves * chunks) + (leaf * chunks + chunk)[None, :]
    largest = tl.load(top + row, mask=row < rows, other=0.0)[:, None]
    scale = exp(tl.load(tops + at, mask=inside, other=0.0) - largest)
    terms = tl.where(inside, tl.load(sums + at, mask=inside, other=0.0) * scale, 0.0)
    tl.store(total + row, pairs(terms, ROWS, LEAVES * CHUNKS), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _losses(top, total, picked, loss, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    difference = tl.load(picked + row, mask=inside, other=0.0) - tl.load(top + row, mask=inside, other=0.0)
    tl.store(loss + row, log(tl.load(total + row, mask=inside, other=1.0)) - difference, mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def _logits_gradient(z, target, top, total, dloss, dz, columns, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = row * columns + column
    values = widened(tl.load(z + at, mask=column < columns, other=0.0))
    weights = exp(values - tl.load(top + row)) * tl.div_rn(1.0, tl.load(total + row))
    out = tl.where(column == tl.load(target + row), weights - 1.0, weights) * tl.load(dloss + row)
    tl.store(dz + at, narrowed(out, dz.dtype.element_ty), mask=column < columns)

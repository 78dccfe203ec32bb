"""Softmax and cross-entropy on a GPU: sums of exponentials by pairs (`pairs_gpu`), of rows of any length.

    short row    maximum, sum and result in one program
    long row     chunks of CHUNK: (maximum m_c, sum s_c of exp(z - m_c)) of each in one pass over the row, then
                 M = max m_c,  S = Σ s_c·exp(m_c - M) by pairs, then the result element by element

A vocabulary's leaves are cut into chunks one by one, so that a leaf's share of S does not depend on who holds it.
Maxima are exact in any order. Legend: R rows, V columns of a row, L leaves, C chunks of a leaf.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product as combinations
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from patches.order.kernels.pairs import LAUNCH, contiguous_rows, narrowed, on, pairs, power_of_two, variant, widened
from patches.order.kernels.sums import sums_of_rows
from patches.order.kernels.variant import Variant

__all__ = ["exponentials", "joined", "logits_gradient", "softmax", "softmax_gradient", "variants"]

CHUNK = 4096
SHORT = 16384
TILE = 4096


def softmax(x: Tensor, dim: int, dtype: torch.dtype, log: bool = False) -> Tensor:
    """Softmax of `x` along `dim`, or its logarithm, in `dtype`; a row of -∞ gives NaN."""
    if not x.dim():
        return softmax(x.view(1), 0, dtype, log).view(())
    if not x.numel():
        return x.to(dtype)
    rows = contiguous_rows(x, dim)
    y = torch.empty_like(rows, dtype=dtype)
    meta = _meta(rows.shape[1])
    top, total = (rows, rows) if meta["WHOLE"] else joined(*exponentials(rows, 1))
    with on(x):
        _softmax[_grid(rows, meta)](rows, top, total, y, *rows.shape, LOG=log, **meta, **LAUNCH)
    return _back(y, x, dim)


def softmax_gradient(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype, log: bool = False) -> Tensor:
    """The gradient that `dy` gives the input of `y = softmax(…)`, or of its logarithm, in `dtype`."""
    if not y.dim():
        return softmax_gradient(dy.view(1), y.view(1), 0, dtype, log).view(())
    if not y.numel():
        return y.to(dtype)
    dy_RV, y_RV = contiguous_rows(dy, dim), contiguous_rows(y, dim)
    dx = torch.empty_like(y_RV, dtype=dtype)
    meta = _meta(y_RV.shape[1])
    total = dy_RV if meta["WHOLE"] else sums_of_rows(dy_RV, None if log else y_RV)
    with on(y):
        _softmax_gradient[_grid(y_RV, meta)](dy_RV, y_RV, total, dx, *y_RV.shape, LOG=log, **meta, **LAUNCH)
    return _back(dx, y, dim)


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


def variants() -> Iterator[Variant]:
    """Short and long rows, aligned and not; what holds for bfloat16 holds for float16."""
    for name, aligned in combinations(("fp32", "bf16"), (True, False)):
        how, divisible = ("", "columns") if aligned else (" unaligned", "")
        stats = {"top": "*fp32", "total": "*fp32"}
        for columns, log in combinations((1024, SHORT, 2 * SHORT), (False, True) if aligned else (False,)):
            meta = _meta(columns) | {"LOG": log}
            warps = meta.pop("num_warps")
            kind = f"{'log_' if log else ''}softmax of {columns} {name}{how}"
            short = {"top": f"*{name}", "total": f"*{name}"} if meta["WHOLE"] else stats
            pointers = {"x": f"*{name}", "y": f"*{name}"} | short
            yield variant(kind, _softmax, pointers, meta, warps, divisible)
            total = {"total": short["total"]}
            pointers = {"dy": f"*{name}", "y": f"*{name}", "dx": f"*{name}"} | total
            yield variant(f"{kind} backward", _softmax_gradient, pointers, meta, warps, divisible)
        pointers = {"z": f"*{name}", "tops": "*fp32", "sums": "*fp32"}
        yield variant(
            f"exponentials {name}{how}", _exponentials, pointers, {"ALIGNED": aligned, "CHUNK": CHUNK}, 8, divisible
        )
        pointers = {"z": f"*{name}", "target": "*i64", "dloss": "*fp32", "dz": f"*{name}"} | stats
        yield variant(f"logits gradient {name}{how}", _logits_gradient, pointers, {"BLOCK": TILE}, 8, divisible)
    pointers = dict.fromkeys(("tops", "sums", "top", "total"), "*fp32")
    yield variant("joined exponentials", _joined, pointers, {"ROWS": 16, "LEAVES": 8, "CHUNKS": 8}, 4)


def _meta(columns: int) -> dict[str, Any]:
    """Short rows are taken whole, several at a time where they are very short; of long ones, a block."""
    block = power_of_two(columns) if columns <= SHORT else TILE
    tile = max(block, TILE)
    return {"WHOLE": columns <= SHORT, "ROWS": tile // block, "BLOCK": block, "num_warps": min(tile // 512, 16)}


def _grid(x_RV: Tensor, meta: dict[str, Any]) -> tuple[int]:
    rows, columns = x_RV.shape
    return (-(-columns // meta["BLOCK"]) * -(-rows // meta["ROWS"]),)


def _back(rows: Tensor, x: Tensor, dim: int) -> Tensor:
    """Rows along `dim` in the shape of `x`."""
    return rows.view(x.movedim(dim, -1).shape).movedim(-1, dim).contiguous()


@triton.jit(do_not_specialize=["rows"])
def _softmax(
    x, top, total, y, rows, columns,
    WHOLE: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside, at = _place(rows, columns, ROWS, BLOCK)
    z = widened(tl.load(x + at, mask=inside, other=-float("inf")))
    if WHOLE:
        z -= tl.max(z, axis=1)[:, None]
        out = tl.exp(z)
        sums = pairs(tl.where(column < columns, out, 0.0), ROWS, BLOCK)
    else:
        z -= tl.load(top + row, mask=row < rows, other=0.0)[:, None]
        out = tl.exp(z)
        sums = tl.load(total + row, mask=row < rows, other=1.0)
    if LOG:
        out = z - tl.log(sums)[:, None]
    else:
        out *= tl.div_rn(1.0, sums)[:, None]
    tl.store(y + at, narrowed(out, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _softmax_gradient(
    dy, y, total, dx, rows, columns,
    WHOLE: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, _, inside, at = _place(rows, columns, ROWS, BLOCK)
    grad = widened(tl.load(dy + at, mask=inside, other=0.0))
    weights = widened(tl.load(y + at, mask=inside, other=0.0))
    if LOG:
        terms = grad
        weights = tl.exp(weights)
    else:
        grad *= weights
        terms = grad
    if WHOLE:
        sums = pairs(terms, ROWS, BLOCK)
    else:
        sums = tl.load(total + row, mask=row < rows, other=0.0)
    tl.store(dx + at, narrowed(grad - weights * sums[:, None], dx.dtype.element_ty), mask=inside)


@triton.jit
def _place(rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows [ROWS] and columns [1, BLOCK], which of its elements exist, and where they lie."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    return row, column, (row < rows)[:, None] & (column < columns), row[:, None] * columns + column


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
    terms = tl.reshape(tl.exp(values - shift), [1, CHUNK])
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
    scale = tl.exp(tl.load(tops + at, mask=inside, other=0.0) - largest)
    terms = tl.where(inside, tl.load(sums + at, mask=inside, other=0.0) * scale, 0.0)
    tl.store(total + row, pairs(terms, ROWS, LEAVES * CHUNKS), mask=row < rows)


@triton.jit(do_not_specialize=["blocks"])
def _logits_gradient(z, target, top, total, dloss, dz, columns, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = row * columns + column
    values = widened(tl.load(z + at, mask=column < columns, other=0.0))
    weights = tl.exp(values - tl.load(top + row)) * tl.div_rn(1.0, tl.load(total + row))
    out = tl.where(column == tl.load(target + row), weights - 1.0, weights) * tl.load(dloss + row)
    tl.store(dz + at, narrowed(out, dz.dtype.element_ty), mask=column < columns)

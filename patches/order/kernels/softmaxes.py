"""Softmax, its logarithm and their gradient: sums of exponentials by pairs, of rows of any length.

    short row    maximum, sum and result in one program
    long row     its maximum and sum as of a vocabulary of one leaf (`cross_entropy`), then the result by elements

Legend: R rows, V columns of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from patches.order.kernels.cross_entropy import exponentials, joined
from patches.order.kernels.exponentials import exp, log
from patches.order.kernels.pairs import LAUNCH, contiguous_rows, narrowed, on, pairs, power_of_two, widened
from patches.order.kernels.sums import sums_of_rows

__all__ = ["SHORT", "softmax", "softmax_gradient"]

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
        out = exp(z)
        sums = pairs(tl.where(column < columns, out, 0.0), ROWS, BLOCK)
    else:
        z -= tl.load(top + row, mask=row < rows, other=0.0)[:, None]
        out = exp(z)
        sums = tl.load(total + row, mask=row < rows, other=1.0)
    if LOG:
        out = z - log(sums)[:, None]
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
        weights = exp(weights)
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

"""Many products in one launch of `gemm_kernel`: each run of rows with a matrix of its own, as experts have them.

    forward, dgrad   y[rows of e] = x[rows of e]·w_e            M of a product follows from the routing
    wgrad            total_e += dy[run]ᵀ·x[run], in units       K does; products of one expert add to the same integers

Operands are loaded by pointers, since no TMA descriptor holds several addresses; bits follow from neither.
Legend: R rows of all products, M, N result, K summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from patches.order.kernels.gemm_kernel import kernel
from patches.order.kernels.pairs import INTERPRETED, on, rounded
from patches.order.kernels.plans import How, constants, free_processors, layout_of
from patches.order.kernels.tiles import tiles_of

__all__ = ["add_grouped_products_in_units", "grouped_product"]


class _Product(NamedTuple):
    """Addresses of operands and result; M or K, whichever varies."""

    a: int
    b: int
    out: int
    size: int


def grouped_product(
    x_RK: Tensor, matrices_KN: Sequence[Tensor], sizes: Sequence[int], leaves: int = 1, pieces: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Runs of rows of x, each of its size, by a matrix each: [R, N], every product as `product` has it."""
    first = matrices_KN[0]
    out = x_RK.new_empty(len(x_RK), first.shape[1], dtype=torch.float32 if INTERPRETED else dtype)
    products = [
        _Product(x_RK[start:].data_ptr(), b.data_ptr(), out[start:].data_ptr(), size)
        for start, b, size in zip(accumulate(sizes, initial=0), matrices_KN, sizes, strict=False)
    ]
    _launch("M", products, x_RK, first, out, leaves, pieces)
    return rounded(out, dtype) if INTERPRETED else out


def add_grouped_products_in_units(
    totals_MN: Sequence[Tensor], bounds: Sequence[Tensor], dy_RM: Tensor, x_RN: Tensor, runs: Sequence[Sequence[int]]
) -> None:
    """total += dyᵀ·x of each run of its rows, in units of the grid, and bound += max|dyᵀ·x| of each."""
    products, owners, start = [], [], 0
    for number, (total, of_total) in enumerate(zip(totals_MN, runs, strict=True)):
        for size in of_total:
            dy, x = dy_RM[start:], x_RN[start:]
            products.append(_Product(dy.data_ptr(), x.data_ptr(), total.data_ptr(), size))
            owners.append(number)
            start += size
    largest = torch.zeros(len(products), dtype=torch.int32, device=x_RN.device)
    _launch("K", products, dy_RM.t(), x_RN, totals_MN[0], 1, 1, largest)
    sums = largest.new_zeros(len(bounds), dtype=torch.float64)
    sums.index_add_(
        0, torch.tensor(owners, dtype=torch.int64, device=sums.device), largest.view(torch.float32).double()
    )
    torch._foreach_add_(list(bounds), list(sums.unbind()))


def _launch(
    varies: str, products: Sequence[_Product], a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, leaves: int, pieces: int,
    largest: Tensor | None = None,
) -> None:  # fmt: skip
    """All `products` that have elements; a, b and out are laid out as all operands and results are."""
    (m, n), k = out_MN.shape, a_MK.shape[1] // pieces
    tile = tiles_of(a_MK.dtype, leaves, False)[0]
    tiles_n, table, tiles = triton.cdiv(n, tile.n), [], 0
    for one in products:
        table.append((tiles, *one))
        tiles += triton.cdiv(one.size if varies == "M" else m, tile.m) * tiles_n
    if not tiles:
        return
    programs = min(tiles, free_processors(a_MK.device, False))
    levels = max(0, leaves.bit_length() - 1 - tile.register_levels)
    scratch = a_MK.new_empty(programs * levels * tile.m * tile.n, dtype=torch.float32) if levels else None
    in_units = out_MN.dtype == torch.int64
    aligned = all(address % 16 == 0 for row in table for address in row[1:4])
    how = How(added=in_units, in_units=in_units, varies=varies, aligned=aligned)
    a, b, out = (layout_of(x) for x in (a_MK, b_KN, out_MN))
    rows = torch.tensor([*table, (tiles, 0, 0, 0, 0)], dtype=torch.int64).to(a_MK.device, non_blocking=True)
    steps, tiles_m = triton.cdiv(triton.cdiv(k, leaves), tile.k), triton.cdiv(m, tile.m)
    m, k = (0, k) if varies == "M" else (m, 0)  # what varies is in the table: the kernel is compiled for none of it
    with on(a_MK):
        kernel[(programs,)](
            a_MK, None, out_MN, scratch, 1.0, largest, rows, m, n, k, steps, tiles_m, tiles_n, tiles,
            *a.strides, *b.strides, *out.strides,
            **constants(tile, leaves, pieces, False, a, b.transposed, how),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

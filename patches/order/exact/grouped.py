"""Products of runs of rows, each with a matrix of its own: one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from patches.order.exact.products import add_product_in_units, product

__all__ = ["add_grouped_products_in_units", "grouped_product"]


def grouped_product(
    x_RK: Tensor, matrices_KN: Sequence[Tensor], sizes: Sequence[int], leaves: int = 1, pieces: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Runs of rows of x, each of its size, by a matrix each: [R, N]."""
    runs = zip(x_RK.split(list(sizes)), matrices_KN, strict=True)
    return torch.cat([product(x, matrix, leaves, pieces, dtype) for x, matrix in runs])


def add_grouped_products_in_units(
    totals_MN: Sequence[Tensor], bounds: Sequence[Tensor], dy_RM: Tensor, x_RN: Tensor, runs: Sequence[Sequence[int]]
) -> None:
    """total += dyᵀ·x of each run of its rows, in units of the grid, and bound += max|dyᵀ·x| of each."""
    sizes = list(chain.from_iterable(runs))
    owners = chain.from_iterable([number] * len(of_total) for number, of_total in enumerate(runs))
    for number, dy, x in zip(owners, dy_RM.split(sizes), x_RN.split(sizes), strict=True):
        add_product_in_units(totals_MN[number], bounds[number], dy.t(), x)

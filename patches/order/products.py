"""Products by what computes on their operands' device, which must be the one that training was patched for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patches.order.backend import product_backend

__all__ = [
    "add_grouped_products_in_units",
    "add_product",
    "add_product_in_units",
    "grouped_product",
    "product",
]


def product(
    a_MK: Tensor,
    b_KN: Tensor,
    leaves: int = 1,
    pieces: int = 1,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    beside_collective: bool = False,
) -> Tensor:
    """`Backend.product`."""
    return product_backend(a_MK, b_KN).product(a_MK, b_KN, leaves, pieces, dtype, scale, beside_collective)


def add_product(into: Tensor, a_MK: Tensor, b_KN: Tensor, beside_collective: bool = False) -> None:
    """`Backend.add_product`."""
    product_backend(into, a_MK, b_KN).add_product(into, a_MK, b_KN, beside_collective)


def add_product_in_units(
    total: Tensor, bound: Tensor, a_MK: Tensor, b_KN: Tensor, beside_collective: bool = False
) -> None:
    """`Backend.add_product_in_units`."""
    product_backend(total, a_MK, b_KN).add_product_in_units(total, bound, a_MK, b_KN, beside_collective)


def grouped_product(
    x_RK: Tensor, matrices_KN: Sequence[Tensor], sizes: Sequence[int], leaves: int = 1, pieces: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """`Backend.grouped_product`."""
    compute = product_backend(x_RK, *matrices_KN)
    return compute.grouped_product(x_RK, matrices_KN, sizes, leaves, pieces, dtype)


def add_grouped_products_in_units(
    totals_MN: Sequence[Tensor], bounds: Sequence[Tensor], dy_RM: Tensor, x_RN: Tensor, runs: Sequence[Sequence[int]]
) -> None:
    """`Backend.add_grouped_products_in_units`."""
    product_backend(dy_RM, x_RN, *totals_MN).add_grouped_products_in_units(totals_MN, bounds, dy_RM, x_RN, runs)

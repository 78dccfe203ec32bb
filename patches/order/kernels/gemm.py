"""Leaf and tree products: one Triton kernel (`gemm_kernel`) for all layouts, batches and numbers of leaves.

No split of K: bits depend on groups of 16 along K, counted from a leaf's start (`tensor_core`), and on nothing that
`tiles` or `plans` choose. Legend: M, N result, K summed, B batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from patches.order.kernels.library import cublas, specialised
from patches.order.kernels.plans import plan

__all__ = ["add_product", "add_product_in_units", "fields_of", "product"]

LIBRARY = cublas()
TREES = specialised()


def product(
    a_MK: Tensor,
    b_KN: Tensor,
    leaves: int = 1,
    pieces: int = 1,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    beside_collective: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """a·b as the tree over `leaves` of K, accumulated in float32 and rounded once to `dtype`, zeros as +0.

    Args:
        a_MK: [M, K] or [B, M, K], bfloat16, float16 or float32, any strides.
        b_KN: [K, N] or [B, K, N], same dtype.
        leaves: a power of two; leaf j of K starts at ⌊j·K/leaves⌋.
        pieces: 2 where K holds [gate | up]: leaf j is gate[j], then up[j].
        scale: what the float32 root is multiplied by, in float32, before it is rounded.
        beside_collective: leave some multiprocessors to one that is under way; the same bits.
        into: float32 [M, N] or [B, M, N] that the float32 root is added to and which is returned; `dtype` is ignored.
    """
    operands, added = fields_of(a_MK, b_KN), None if into is None else _fields(into)
    call = plan(operands, leaves, pieces, dtype, scale != 1, beside_collective, added)
    ours = partial(call.run, a_MK, b_KN, scale, into)
    one = leaves == pieces == 1 and scale == 1 and not beside_collective and a_MK.dim() == 2 and call.plan is not None
    if LIBRARY is not None and one and a_MK.dtype == torch.bfloat16:
        return LIBRARY.product((operands, dtype, added), ours, into, a_MK, b_KN, dtype)
    if TREES is not None and leaves > 1 and scale == 1 and into is None:
        library, how = TREES[0], (operands, leaves, pieces, dtype, beside_collective)
        launch = TREES[1].launch(*how)
        if launch is not None:
            return library.product(how, ours, None, a_MK, b_KN, launch, dtype)
    return ours()


def fields_of(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    """Those of the operands' `Layout`s."""
    return *_fields(a), *_fields(b)


def add_product(into: Tensor, a_MK: Tensor, b_KN: Tensor, beside_collective: bool = False) -> None:
    """into += a·b."""
    if into.dtype == torch.float32:
        product(a_MK, b_KN, beside_collective=beside_collective, into=into)
    else:
        into.add_(product(a_MK, b_KN, beside_collective=beside_collective))


def add_product_in_units(
    total: Tensor, bound: Tensor, a_MK: Tensor, b_KN: Tensor, beside_collective: bool = False
) -> None:
    """total += a·b in units of the grid, int64, in the product's own kernel; bound += max|a·b|."""
    call = plan(fields_of(a_MK, b_KN), 1, 1, torch.float32, False, beside_collective, _fields(total))
    largest = torch.zeros((), dtype=torch.int32, device=total.device)  # bits of a float32 that is not negative
    call.run(a_MK, b_KN, 1.0, total, largest)
    bound.add_(largest.view(torch.float32))


def _fields(x: Tensor) -> tuple[Any, ...]:
    return x.device, x.shape, x.stride(), x.dtype, x.data_ptr() % 16

"""Exact sums and products: values that no grouping, shape, thread count or BLAS can change.

`order.slices` defines them; `order.brackets` gives nearly every one of them, once it is rounded, at the price of one
ordinary float64 sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from patches.order.exact.brackets import UNIT, bracketed_product
from patches.order.exact.slices import FLOAT64_BITS, rounded, sliced_sum

__all__ = ["exact_product", "exact_sum", "pieces", "rounded", "rounded_sum", "sum_bounds", "sum_of_squares"]

OPERANDS = frozenset((torch.float32, torch.bfloat16, torch.float16))

# Grid of the gradient norm: 2^37 squares of 16 bits sum exactly; 5 slices keep 80 bits below the largest.
NORM_BITS = 16
NORM_SLICES = 5
NORM_CHUNK = 1 << 16


def exact_product(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One leaf's product, a·b, as float32 [..., M, N], rounded once more to `dtype`.

    Args:
        a_MK: [..., M, K], float32, bfloat16 or float16, any strides.
        b_KN: [..., K, N], same dtypes and leading dimensions.

    Every element is a function of its own row of `a` and column of `b` alone. Error against the exact sum
    of products, before the final rounding to float32: at most 2^-48 · Σ|a_k·b_k|. Infinities and NaNs give
    what IEEE arithmetic gives, NaNs the canonical one; zeros are +0.
    """
    for x in (a_MK, b_KN):
        if x.dtype not in OPERANDS:
            raise TypeError(f"exact products take float32, bfloat16 or float16, not {x.dtype}")
    if not (a_MK.numel() and b_KN.numel()):
        return a_MK.new_zeros((*a_MK.shape[:-1], b_KN.shape[-1]), dtype=dtype)
    return bracketed_product(a_MK, b_KN, dtype)


def exact_sum(x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """Σx over `dim`, as float64 that depends on the summed elements alone.

    Args:
        x: float32, bfloat16, float16, or float64 with a dynamic range that float32 products can have.
        dim: one or several dimensions; an empty one sums to 0.
    """
    if x.dim() == 0:
        return x.double()
    dims = tuple(d % x.dim() for d in ([dim] if isinstance(dim, int) else dim))
    kept = [d for d in range(x.dim()) if d not in dims]
    rows = x.permute(*kept, *dims).reshape(*(x.shape[d] for d in kept), math.prod(x.shape[d] for d in dims))
    total = sliced_sum(rows.clone() if rows.dtype == torch.float64 else rows.double())
    if keepdim:
        total = total.reshape([1 if d in dims else x.shape[d] for d in range(x.dim())])
    return total


def rounded_sum(x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """`exact_sum` of float32, bfloat16 or float16, rounded to float32."""
    if not x.numel() or not x.dim():
        return exact_sum(x, dim, keepdim).float()
    dims = [d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)]
    wide = x.double()
    low, high = (end.float() for end in sum_bounds(wide, dims, keepdim))
    if not torch.equal(low, high):
        doubt = low.ne(high).view([x.shape[d] for d in range(x.dim()) if d not in dims])
        rows = wide.movedim(dims, list(range(-len(dims), 0)))[doubt]
        low.view(doubt.shape)[doubt] = sliced_sum(rows.flatten(1)).float()
    return low.add_(0.0)


def sum_bounds(x: Tensor, dims: list[int], keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Two float64 numbers around `exact_sum` of float64 `x`, which is not empty; NaN where that is not finite."""
    y = x.sum(dims, keepdim)
    # A plain sum is off by less than a unit per term; of the exact one, the additions of up to 18 slices round.
    magnitude = torch.linalg.vector_norm(x, 1, dims, keepdim) if x.dim() - 1 in dims else x.abs().sum(dims, keepdim)
    margin = magnitude.mul_(1.01 * UNIT * (x.numel() // y.numel() + 40))
    return y - margin, y.add_(margin)


def sum_of_squares(tensors: Sequence[Tensor], largest: float) -> Tensor:
    """Slices of Σx² over all tensors: float64 [NORM_SLICES], each exact, so that ranks may add them in any order.

    Args:
        tensors: float32, bfloat16 or float16; together with the other ranks' at most 2^37 elements.
        largest: a power of two above every |x| on every rank; it sets the grid.

    What lies below 2^-80 of the largest square is rounded per element: no layout can change it.
    """
    device = tensors[0].device if tensors else None
    out = torch.zeros(NORM_SLICES, dtype=torch.float64, device=device)
    shifts = [largest * largest * 1.5 * 2.0 ** (FLOAT64_BITS - 1 - NORM_BITS * (i + 1)) for i in range(NORM_SLICES)]
    for piece in pieces(tensors):
        squares, parts = piece.double().square_(), []
        for shift in shifts:
            head = (squares + shift).sub_(shift)
            squares.sub_(head)
            parts.append(head.sum())
        out.add_(torch.stack(parts))
    return out


def pieces(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """All elements, flat, up to NORM_CHUNK at a time, which stay in a core's cache; small tensors come together."""
    held: list[Tensor] = []
    for tensor in tensors:
        for piece in tensor.detach().reshape(-1).split(NORM_CHUNK) if tensor.numel() else ():
            if held and (piece.dtype != held[0].dtype or sum(map(len, held)) + len(piece) > NORM_CHUNK):
                yield torch.cat(held)
                held = []
            held.append(piece)
    if held:
        yield torch.cat(held)

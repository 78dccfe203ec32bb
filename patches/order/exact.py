"""Exact sums and products: values that no grouping, shape, thread count or BLAS can change.

A row of numbers is cut into *slices*, each a multiple of a power of two that its own largest element sets:

    x = s0 + s1 + s2 + …      |s0| ≤ 2^e, s0 ∈ 2^(e-β)·ℤ;   s1 likewise for what s0 left over;   …

Sums of n such numbers, and products of two such slices over K, stay below 2^53 units, so float64 computes
them without rounding, in whatever order the library likes. The slices' results are then added largest
first, one float64 addition each. Slicing ends when nothing is left over, so no bit of an operand is lost;
a slice that is zero adds nothing, so skipping it changes nothing.

Pre-rounding to a grid: Demmel & Nguyen, "Fast reproducible floating-point summation" (ARITH 2013); slicing
for error-free products: Ozaki, Ogita, Oishi & Rump, Numer. Algorithms 59 (2012).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["exact_product", "exact_product_of", "exact_sum", "rounded", "sum_of_squares", "widened"]

OPERANDS = frozenset((torch.float32, torch.bfloat16, torch.float16))
FLOAT64_BITS = 53
GRID_BITS = 50  # adding and subtracting 1.5·2^52 units rounds |x| < 2^51 units
EXPONENT_MASK = 0x7FF0_0000_0000_0000

# Grid of the gradient norm: 2^37 squares of 16 bits sum exactly; 5 slices keep 80 bits below the largest.
NORM_BITS = 16
NORM_SLICES = 5
NORM_CHUNK = 1 << 22


def exact_product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """One leaf's product, a·b, as float32 [..., M, N].

    Args:
        a_MK: [..., M, K], float32, bfloat16 or float16, any strides.
        b_KN: [..., K, N], same dtypes and leading dimensions.

    Every element is a function of its own row of `a` and column of `b` alone. Error against the exact sum
    of products, before the final rounding to float32: at most 2^-48 · Σ|a_k·b_k|. Infinities and NaNs give
    what IEEE arithmetic gives, NaNs the canonical one; zeros are +0.
    """
    return exact_product_of(widened(a_MK), widened(b_KN))


def widened(x: Tensor) -> Tensor:
    """A float64 copy of `x`, which must be float32, bfloat16 or float16."""
    if x.dtype not in OPERANDS:
        raise TypeError(f"exact products take float32, bfloat16 or float16, not {x.dtype}")
    return x.to(torch.float64)


def exact_product_of(a: Tensor, b: Tensor) -> Tensor:
    """`exact_product` of two `widened` operands, which it consumes."""
    if not a.shape[-1]:
        return a.new_zeros((*a.shape[:-1], b.shape[-1]), dtype=torch.float32)
    tops = [_largest(a, -1), _largest(b, -2)]
    special = None
    if not all(bool(top.isfinite().all()) for top in tops):
        special = _matmul(a, b)
        a, b = (torch.where(x.isfinite(), x, 0.0) for x in (a, b))
        tops = [_largest(a, -1), _largest(b, -2)]
    bits = (FLOAT64_BITS - _log2_ceil(a.shape[-1])) // 2
    out = _sliced_product(list(_slices(a, tops[0], -1, bits)), list(_slices(b, tops[1], -2, bits)))
    if special is None:
        return out.float().add_(0.0)
    return rounded(torch.where(special.isfinite(), out, special), torch.float32)


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
    total = _exact_row_sum(rows.double() if rows.dtype != torch.float64 else rows.clone())
    if keepdim:
        total = total.reshape([1 if d in dims else x.shape[d] for d in range(x.dim())])
    return total


def sum_of_squares(tensors: Sequence[Tensor], largest: float) -> Tensor:
    """Slices of Σx² over all tensors: float64 [NORM_SLICES], each exact, so that ranks may add them in any order.

    Args:
        tensors: float32, bfloat16 or float16; together with the other ranks' at most 2^37 elements.
        largest: a power of two above every |x| on every rank; it sets the grid.

    What lies below 2^-80 of the largest square is rounded per element: no layout can change it.
    """
    device = tensors[0].device if tensors else None
    out = torch.zeros(NORM_SLICES, dtype=torch.float64, device=device)
    for tensor in tensors:
        for chunk in tensor.detach().reshape(-1).split(NORM_CHUNK):
            squares = chunk.double().square_()
            for i in range(NORM_SLICES):
                shift = largest * largest * 1.5 * 2.0 ** (FLOAT64_BITS - 1 - NORM_BITS * (i + 1))
                head = (squares + shift).sub_(shift)
                squares.sub_(head)
                out[i] += head.sum()
    return out


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to `dtype`, with every zero +0 and every NaN the canonical one."""
    x = x.to(dtype).add(0.0)
    if x.is_cuda:
        return x  # its arithmetic gives no other NaN, and asking would wait for the device
    nan = x.isnan()
    return x.masked_fill_(nan, math.nan) if bool(nan.any()) else x


def _slices(x: Tensor, top: Tensor, dim: int, bits: int) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Cut float64 `x`, which it consumes, along `dim`: (indices of the rows that are left or None for all, slice)."""
    rows: Tensor | None = None
    while True:
        head = _on_grid(x, top, bits)
        x.sub_(head)
        yield rows, head
        top = _largest(x, dim)
        left = top.ne(0).squeeze(dim)
        if not bool(left.any()):
            return
        if x.dim() == 2 and not bool(left.all()):
            index = left.nonzero().squeeze(1)
            kept = 0 if dim == -1 else 1
            x, top = x.index_select(kept, index), top.index_select(kept, index)
            rows = index if rows is None else rows[index]


def _largest(x: Tensor, dim: int) -> Tensor:
    """max |x| along `dim`, which stays as size 1; infinities and NaNs come through."""
    return x.abs().amax(dim, keepdim=True)


def _on_grid(x: Tensor, top: Tensor, bits: int) -> Tensor:
    """`x` rounded to multiples of 2^(e-bits), 2^e being the power of two above `top`, which it consumes."""
    power = top.view(torch.int64).bitwise_and_(EXPONENT_MASK).view(torch.float64)
    shift = power.mul_(1.5 * 2.0 ** (FLOAT64_BITS - bits))
    return (x + shift).sub_(shift)


def _sliced_product(a: list[tuple[Tensor | None, Tensor]], b: list[tuple[Tensor | None, Tensor]]) -> Tensor:
    pairs = sorted(((i, j) for i in range(len(a)) for j in range(len(b))), key=lambda ij: (sum(ij), ij))
    out = _matmul(a[0][1], b[0][1])
    for i, j in pairs[1:]:
        (rows, a_i), (cols, b_j) = a[i], b[j]
        part = _matmul(a_i, b_j)
        if rows is not None and cols is not None:
            out.index_copy_(0, rows, out.index_select(0, rows).index_add_(1, cols, part))
        elif rows is not None:
            out.index_add_(0, rows, part)
        elif cols is not None:
            out.index_add_(1, cols, part)
        else:
            out.add_(part)
    return out


def _exact_row_sum(x: Tensor) -> Tensor:
    """Σx over the last dimension of float64 `x`, which it consumes."""
    total = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
    if not x.numel():
        return total
    bits = min(FLOAT64_BITS - _log2_ceil(x.shape[-1]), GRID_BITS)
    top = _largest(x, -1)
    special = None
    if not bool(top.isfinite().all()):
        special = x.sum(-1)
        x = torch.where(x.isfinite(), x, 0.0)
        top = _largest(x, -1)
    while bool(top.any()):
        head = _on_grid(x, top, bits)
        x.sub_(head)
        total.add_(head.sum(-1))
        top = _largest(x, -1)
    return total if special is None else torch.where(special.isfinite(), total, special)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)


def _log2_ceil(n: int) -> int:
    return max(n - 1, 0).bit_length()

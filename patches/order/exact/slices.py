"""What an exact sum or product is, by definition: values that no grouping, shape, thread count or BLAS can change.

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
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["FLOAT64_BITS", "log2_ceil", "matmul", "on_grid", "product_bits", "rounded", "sliced_product", "sliced_sum"]

FLOAT64_BITS = 53
GRID_BITS = 50  # adding and subtracting 1.5·2^52 units rounds |x| < 2^51 units
EXPONENT_MASK = 0x7FF0_0000_0000_0000


def sliced_product(a: Tensor, b: Tensor) -> Tensor:
    """a·b in float64, [..., M, N], of float64 [..., M, K] and [..., K, N], K > 0, which it consumes.

    Infinities and NaNs give what IEEE arithmetic gives.
    """
    tops = [_largest(a, -1), _largest(b, -2)]
    special = None
    if not all(bool(top.isfinite().all()) for top in tops):
        special = matmul(a, b)
        a, b = (torch.where(x.isfinite(), x, 0.0) for x in (a, b))
        tops = [_largest(a, -1), _largest(b, -2)]
    bits = product_bits(a.shape[-1])
    out = _sum_of_products(list(_slices(a, tops[0], -1, bits)), list(_slices(b, tops[1], -2, bits)))
    return out if special is None else torch.where(special.isfinite(), out, special)


def product_bits(k: int) -> int:
    """Bits of a slice whose products are summed over `k`."""
    return (FLOAT64_BITS - log2_ceil(k)) // 2


def sliced_sum(x: Tensor) -> Tensor:
    """Σx over the last dimension of float64 `x`, which it consumes."""
    total = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
    if not x.numel():
        return total
    bits = min(FLOAT64_BITS - log2_ceil(x.shape[-1]), GRID_BITS)
    top = _largest(x, -1)
    largest, special = float(top.amax()), None
    if not math.isfinite(largest):
        special = x.sum(-1)
        x = torch.where(x.isfinite(), x, 0.0)
        top = _largest(x, -1)
        largest = float(top.amax())
    while largest:
        head = on_grid(x, top, bits)
        total.add_(head.sum(-1))
        top = _largest(x.sub_(head), -1)
        largest = float(top.amax())
    return total if special is None else torch.where(special.isfinite(), total, special)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to `dtype`, with every zero +0 and every NaN the canonical one."""
    y = x.to(dtype).add(0.0)
    if x.numel() and math.isnan(float(x.amax())):  # the largest number is NaN if any is
        y.masked_fill_(y.isnan(), math.nan)
    return y


def on_grid(x: Tensor, top: Tensor, bits: int) -> Tensor:
    """`x` rounded to multiples of 2^(e-bits), 2^e being the power of two above `top`, which it consumes."""
    power = top.view(torch.int64).bitwise_and_(EXPONENT_MASK).view(torch.float64)
    shift = power.mul_(1.5 * 2.0 ** (FLOAT64_BITS - bits))
    return (x + shift).sub_(shift)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)


def log2_ceil(n: int) -> int:
    return max(n - 1, 0).bit_length()


def _slices(x: Tensor, top: Tensor, dim: int, bits: int) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Cut float64 `x`, which it consumes, along `dim`: (indices of the rows that are left or None for all, slice)."""
    rows: Tensor | None = None
    while True:
        head = on_grid(x, top, bits)
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


def _sum_of_products(a: list[tuple[Tensor | None, Tensor]], b: list[tuple[Tensor | None, Tensor]]) -> Tensor:
    pairs = sorted(((i, j) for i in range(len(a)) for j in range(len(b))), key=lambda ij: (sum(ij), ij))
    out = matmul(a[0][1], b[0][1])
    for i, j in pairs[1:]:
        (rows, a_i), (cols, b_j) = a[i], b[j]
        part = matmul(a_i, b_j)
        if rows is not None and cols is not None:
            out.index_copy_(0, rows, out.index_select(0, rows).index_add_(1, cols, part))
        elif rows is not None:
            out.index_add_(0, rows, part)
        elif cols is not None:
            out.index_add_(1, cols, part)
        else:
            out.add_(part)
    return out

"""Products as `order.slices` defines them, rounded, nearly always without its work: one float64 sum, and its bounds.

    y - margin ├── value ──┤ y + margin        whatever the order of y's additions
               └─────┬─────┘
             the same float32: so the value, rounded, is that float32

The few elements whose ends differ are looked at one by one. y is the value where no addition can have rounded, neither
its own nor the value's; else exact products are added in two parts, of which only the last addition rounds; where even
their sum is too near to a tie, or something is infinite, the value is taken as it is defined.

Margins, with K terms, L = ⌈log2 K⌉, u = 2^-53, slices of β bits and a magnitude H above Σ|a_k·b_k| and max|a|·max|b|:
    y           K·u·H, whatever the order of additions
    the value   adding slices 0+1, 1+0, … 3+0: u·|partial sum| each, at most 9·u·(H + K·2^(3-β)·H);
                later ones: at most what they hold, 22·K·2^-4β·H, since slice i is below 2·max|a|·2^-βi
No partial sum of either is above 6.01·Σ|a_k·b_k|; all are multiples of the lowest bit in a times the lowest in b.

Legend: M, N rows and columns of a result, K the summed dimension, n elements in doubt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patches.order.slices import FLOAT64_BITS, log2_ceil, matmul, on_grid, product_bits, rounded, sliced_product

__all__ = ["AT_ONCE", "bracketed_product"]

UNIT = 2.0**-FLOAT64_BITS
BLOCK = 1 << 16  # elements that are looked at at once: they stay in a core's cache
AT_ONCE = 1 << 18  # elements of several products that are taken together: small ones cost less by the dozen
FEW, SHARE = 64, 1 / 256  # elements of a result that are worth looking at one by one
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# Of dtypes with few digits: those after the point, and the exponent of the smallest normal number.
SHORT = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}


def bracketed_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`sliced_product` of `a` [..., M, K] and `b` [..., K, N], K > 0, rounded to float32, then to `dtype`.

    Args:
        a, b: float32, bfloat16 or float16, any strides.
    """
    if a.dim() == 3 and a.shape[0] * a.shape[1] * b.shape[2] > AT_ONCE:
        out = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=dtype, device=a.device)
        for out_MN, a_MK, b_KN in zip(out, a, b, strict=True):
            out_MN.copy_(bracketed_product(a_MK, b_KN, dtype))
        return out
    return _Product(a, b).rounded(dtype)


class _Product:
    """One product: its operands, widened to float64, and their plain product y with a margin of rank one."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.narrow = a, b.mT
        self.a, self.b = a.to(torch.float64), b.to(torch.float64)
        self.k = a.shape[-1]
        self.y = matmul(self.a, self.b)
        self.norm_M, self.norm_N = _norm(self.a, -1), _norm(self.b, -2)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        margin_M = (self.norm_M * _margins(self.k)[0]).unsqueeze(-1)
        margin_N = self.norm_N.unsqueeze(-2)
        if self.y.dim() == 3 or self.y.numel() <= BLOCK:
            out, doubt = _bracket(self.y, margin_M * margin_N, dtype)
        else:
            out, doubt = _bracket_by_rows(self.y, margin_M, margin_N, dtype)
        if doubt is not None:
            self._settle(out, doubt)
        return out

    def _settle(self, out: Tensor, doubt: Tensor) -> None:
        """Put the values at `doubt` [n, dims] into `out`."""
        if len(doubt) > FEW:
            doubt = self._without_exact(out, doubt)
        if len(doubt) > max(FEW, out.shape[-1] + out.shape[-2]):
            doubt = self._without_clear(out, doubt)
        if len(doubt) > max(FEW, SHARE * out.numel()):
            out.copy_(rounded(sliced_product(self.a, self.b), torch.float32))
            return
        for some in doubt.split(max(1, BLOCK // self.k)):
            rows, columns = _places(some)
            magnitude = self.norm_M[rows] * self.norm_N[columns]
            out[tuple(some.unbind(1))] = _dots(self.a[rows], self.b.mT[columns], magnitude, out.dtype)

    def _without_exact(self, out: Tensor, doubt: Tensor) -> Tensor:
        """Doubt without the elements that no addition can have rounded."""
        if any(x.dtype not in SHORT for x in self.narrow):
            return doubt
        rows, columns = _places(doubt)
        units_M, units_N = self.norm_M / _lowest_bit(self.narrow[0]), self.norm_N / _lowest_bit(self.narrow[1])
        exact = units_M[rows] * units_N[columns] < 2.0 ** (FLOAT64_BITS - 3)
        sure, doubt = doubt[exact].unbind(1), doubt[~exact]
        out[sure] = _narrowed(self.y[sure], out.dtype)
        return doubt

    def _without_clear(self, out: Tensor, doubt: Tensor) -> Tensor:
        """Doubt without the elements that margins from other norms leave none about."""
        rows, columns = _places(doubt)
        (one_M, top_M), (one_N, top_N) = _other_norms(self.a, -1), _other_norms(self.b, -2)
        magnitude = torch.minimum(one_M[rows] * top_N[columns], top_M[rows] * one_N[columns])
        places = tuple(doubt.unbind(1))
        out[places], left = _bracket(self.y[places], magnitude.mul_(_margins(self.k)[0]), out.dtype)
        return doubt[:0] if left is None else doubt[left.squeeze(1)]


def _margins(k: int) -> tuple[float, float]:
    """How far a plain sum of `k` products, and one in two parts, is from the value at most, over the magnitude.

    In two parts, 11·u·|sum| comes on top.
    """
    log, bits = log2_ceil(k), product_bits(k)
    rest = 9 * 2.0 ** (log + 3 - bits) + 22 * 2.0 ** (log + FLOAT64_BITS - 4 * bits)
    return 1.01 * UNIT * (k + 13 + rest), 1.01 * UNIT * (2.0 ** (3 * log - 50) + rest)


def _norm(x: Tensor, dim: int) -> Tensor:
    """Euclidean norm along `dim`."""
    if x.stride(dim) == 1 or x.numel() <= BLOCK:
        return torch.linalg.vector_norm(x, 2, dim)
    squares = (part.square().sum(dim) for part in _parts(x, dim))
    total = next(squares)
    for part in squares:
        total.add_(part)
    return total.sqrt_()


def _other_norms(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Σ|x| and max|x| along `dim`."""
    parts = [part.abs() for part in [x]]
    return parts[0].sum(dim), parts[0].amax(dim)


def _parts(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    return x.split(max(1, BLOCK * x.shape[dim] // max(1, x.numel())), dim)


def _lowest_bit(x: Tensor) -> Tensor:
    """A power of two that divides every number of a row of `x` (dtype in SHORT): float64."""
    digits, smallest = SHORT[x.dtype]
    # Less one, zero is the largest.
    least = x.view(torch.int16).bitwise_and(0x7FFF).sub_(1).bitwise_and_(0x7FFF).amin(-1).add_(1)
    exponent = (least >> digits).clamp_(min=1) + (smallest - 1 - digits)
    return torch.exp2(exponent.to(torch.float64))


def _bracket(y: Tensor, margin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """y - margin in `dtype`, and where y + margin is another number, [n, dims] or None; `margin` is consumed."""
    low, high = _narrowed(y - margin, dtype), _narrowed(margin.add_(y), dtype)
    bits = BITS[dtype]
    # In float32 every zero is +0; in what follows a tiny number can become -0.
    if torch.equal(low, high) and (dtype == torch.float32 or torch.equal(low.view(bits), high.view(bits))):
        return low, None
    return low, ((low != high) | (low.view(bits) != high.view(bits))).nonzero()


def _bracket_by_rows(y: Tensor, margin_M: Tensor, margin_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    rows = max(1, BLOCK // y.shape[1])
    out, doubts = torch.empty_like(y, dtype=dtype), []
    for start in range(0, len(y), rows):
        block = slice(start, start + rows)
        out[block], doubt = _bracket(y[block], margin_M[block] * margin_N, dtype)
        if doubt is not None:
            doubt[:, 0] += start
            doubts.append(doubt)
    return out, torch.cat(doubts) if doubts else None


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.float().add_(0.0).to(dtype)


def _places(doubt: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Indices of the rows of a, and of the columns of b, that elements are products of."""
    *batch, i, j = doubt.unbind(1)
    return (*batch, i), (*batch, j)


def _dots(a_nK: Tensor, b_nK: Tensor, magnitude_n: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_k a·b of every row, in `dtype`: in two parts, of which the first is exact."""
    terms = a_nK * b_nK
    head = on_grid(terms, terms.abs().amax(-1, keepdim=True), FLOAT64_BITS - 3 - log2_ceil(terms.shape[-1]))
    rest = terms.sub_(head)
    y = head.sum(-1).add_(rest.sum(-1))
    margin = magnitude_n.mul_(_margins(terms.shape[-1])[1]).add_(y.abs(), alpha=11 * UNIT)
    out, doubt = _bracket(y, margin.masked_fill_(rest.eq(0).all(-1), 0.0), dtype)
    if doubt is not None:
        n = doubt.squeeze(1)
        out[n] = rounded(sliced_product(a_nK[n].unsqueeze(1), b_nK[n].unsqueeze(2)), torch.float32).to(dtype).flatten()
    return out

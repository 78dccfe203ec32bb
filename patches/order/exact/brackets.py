"""Products as `slices` defines them, rounded, nearly always without its work: one float64 sum, and its bounds.

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
Partial sums, of either, are below H + K·2^(3-β)·H, and multiples of the lowest bit in a times the lowest in b.

Legend: M, N rows and columns of a result, K the summed dimension, n elements in doubt.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from patches.order.exact.slices import FLOAT64_BITS, log2_ceil, matmul, on_grid, product_bits, rounded, sliced_product

__all__ = ["SHORT", "UNIT", "at_once", "bracketed_product", "least_power"]

UNIT = 2.0**-FLOAT64_BITS
BLOCK = 1 << 16  # elements that are bracketed at once: they stay in a core's cache
AT_ONCE = 1 << 18  # elements of several products that are taken together: small ones cost less by the dozen
FEW, SHARE = 64, 1 / 256  # elements of a result that are worth looking at one by one
WIDE = 1 / 4  # of all rows and columns that are worth being looked at apart
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# Dtypes with few digits: how many after the point, and the bits of the exponent.
SHORT = {
    torch.bfloat16: (7, torch.tensor(0x7F80, dtype=torch.int16)),
    torch.float16: (10, torch.tensor(0x7C00, dtype=torch.int16)),
}
ONE = torch.ones((), dtype=torch.int16)  # numbers of Python would be made into tensors at every call


def at_once(size: int, leaves: int, results: int) -> bool:
    """Whether the leaves of a dimension of `size` are alike, and their `results` few enough to be held together."""
    return size > 0 and size % leaves == 0 and leaves * results <= AT_ONCE


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
    """One product: its operands, widened to float64, their plain product y, and what is known of its error."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a.double(), b.double()
        self.plain, _, exact = _limits(a.shape[-1])
        self.y = matmul(self.a, self.b)
        self.norms = _norm(self.a, -1), _norm(self.b, -2)
        self.units: tuple[Tensor, Tensor] | None = None
        if a.dtype == b.dtype and a.dtype in SHORT:
            self.exact = exact / 4.0 ** SHORT[a.dtype][0]
            self.units = _units(self.norms[0], a), _units(self.norms[1], b.mT)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        largest = _largest_pair(self.units or self.norms)
        if self.units and largest < self.exact:
            return _narrowed(self.y, dtype)
        if not math.isfinite(largest):
            return rounded(sliced_product(self.a, self.b), torch.float32).to(dtype)
        wide = self._wide() if self.units else None
        if wide is None:
            out = torch.empty_like(self.y, dtype=dtype)
            found = self._by_blocks(out)
        else:
            out = _narrowed(self.y, dtype)
            found = self._in_rows(out, *wide)
        if found:
            self._settle(out, torch.cat(found))
        return out

    def _by_blocks(self, out: Tensor) -> list[Tensor]:
        """Put values into `out`, and list where they are in doubt, [n, dims] each."""
        (M, N), units = self.norms, self.units if out.dtype == torch.float32 else None
        rows = max(1, BLOCK // out.shape[-1]) if out.dim() == 2 else out.shape[1]
        doubts = []
        for start in range(0, out.shape[-2], rows):
            block = slice(start, start + rows)
            margin = M[..., block, None] * N.unsqueeze(-2)
            exact = None if units is None else units[0][..., block, None] * units[1].unsqueeze(-2) < self.exact
            doubt = self._bracket(out[..., block, :], self.y[..., block, :], margin, exact)
            if doubt is not None:
                doubt[:, -2] += start
                doubts.append(doubt)
        return doubts

    def _wide(self) -> tuple[int, Tensor] | None:
        """0 and the rows, or 1 and the columns, [n, dims - 1], that hold all elements that may not be exact; or None.

        None where they are many on either side.
        """
        assert self.units is not None
        sides = [(side, (self.units[side] * self.units[1 - side].amax() >= self.exact).nonzero()) for side in range(2)]
        side, rows = min(sides, key=lambda found: len(found[1]) / self.norms[found[0]].numel())
        return (side, rows) if len(rows) < WIDE * self.norms[side].numel() else None

    def _in_rows(self, out: Tensor, side: int, rows: Tensor) -> list[Tensor]:
        """`_by_blocks` in some rows alone, or columns if `side` is 1."""
        assert self.units is not None
        index = tuple(rows.unbind(1))
        out, y = (out.mT, self.y.mT) if side else (out, self.y)
        margin, units = (
            pair[side][index].unsqueeze(-1) * (pair[1 - side][index[0]] if len(index) == 2 else pair[1 - side])
            for pair in (self.norms, self.units)
        )
        values = torch.empty_like(margin, dtype=out.dtype)
        doubt = self._bracket(values, y[index], margin, units < self.exact)
        out[index] = values
        if doubt is None:
            return []
        *batch, i = rows[doubt[:, 0]].unbind(1)
        return [torch.stack([*batch, doubt[:, 1], i] if side else [*batch, i, doubt[:, 1]], 1)]

    def _bracket(self, out: Tensor, y: Tensor, magnitude: Tensor, exact: Tensor | None) -> Tensor | None:
        margin = magnitude.mul_(self.plain)
        return _bracket(out, y, margin if exact is None else margin.masked_fill_(exact, 0.0))

    def _settle(self, out: Tensor, doubt: Tensor) -> None:
        """Put the values at `doubt` [n, dims] into `out`."""
        if len(doubt) > max(FEW, out.shape[-1] + out.shape[-2]):
            doubt = self._without_clear(out, doubt)
        if len(doubt) > max(FEW, SHARE * out.numel()):
            out.copy_(rounded(sliced_product(self.a, self.b), torch.float32))
            return
        for some in doubt.split(max(1, BLOCK // self.a.shape[-1])):
            rows, columns = _places(some)
            magnitude = self.norms[0][rows] * self.norms[1][columns]
            out[tuple(some.unbind(1))] = _dots(self.a[rows], self.b.mT[columns], magnitude, out.dtype)

    def _without_clear(self, out: Tensor, doubt: Tensor) -> Tensor:
        """Doubt without the elements that other norms leave none about: of rows with few large numbers."""
        rows, columns = _places(doubt)
        (sum_M, top_M), (sum_N, top_N) = _other_norms(self.a, -1), _other_norms(self.b, -2)
        magnitude = torch.minimum(sum_M[rows] * top_N[columns], top_M[rows] * sum_N[columns])
        places = tuple(doubt.unbind(1))
        values = torch.empty_like(magnitude, dtype=out.dtype)
        left = self._bracket(values, self.y[places], magnitude, None)
        out[places] = values
        return doubt[:0] if left is None else doubt[left.squeeze(1)]


def _largest_pair(sides: tuple[Tensor, Tensor]) -> float:
    return float(sides[0].amax() * sides[1].amax())


@lru_cache
def _limits(k: int) -> tuple[float, float, float]:
    """How far a plain sum of `k` products, and one in two parts, is from the value at most, over the magnitude.

    In two parts, 11·u·|sum| comes on top. The third: of what magnitude, in units, no addition rounds.
    """
    log, bits = log2_ceil(k), product_bits(k)
    cut_off = 2.0 ** (log + 3 - bits)
    rest = 9 * cut_off + 22 * 2.0 ** (log + FLOAT64_BITS - 4 * bits)
    return (
        1.01 * UNIT * (k + 13 + rest),
        1.01 * UNIT * (2.0 ** (3 * log - 50) + rest),
        0.99 / UNIT / (1 + cut_off),
    )


def _norm(x: Tensor, dim: int) -> Tensor:
    """Euclidean norm along `dim`."""
    if x.stride(dim) == 1:
        return torch.linalg.vector_norm(x, 2, dim)
    if x.numel() <= BLOCK:
        return (x * x).sum(dim).sqrt_()
    squares = ((part * part).sum(dim) for part in x.split(max(1, BLOCK * x.shape[dim] // x.numel()), dim))
    total = next(squares)
    for part in squares:
        total.add_(part)
    return total.sqrt_()


def _other_norms(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Σ|x| and max|x| along `dim`."""
    absolute = x.abs()
    return absolute.sum(dim), absolute.amax(dim)


def _units(norm: Tensor, x: Tensor) -> Tensor:
    """Norms of the rows of `x` over their `least_power`."""
    return norm / least_power(x)


def least_power(x: Tensor) -> Tensor:
    """Per row of `x`, dtype in SHORT, a power of two whose 2^-digits divides all numbers; infinite if all are 0."""
    # Less one, either zero is infinity, which is never the least; a power of two counts as half of itself.
    return x.view(torch.int16).sub(ONE).bitwise_and_(SHORT[x.dtype][1]).amin(-1).view(x.dtype)


def _bracket(out: Tensor, y: Tensor, margin: Tensor) -> Tensor | None:
    """Put y - margin into `out`, and find where y + margin is another number: [n, dims] or None. Consumes `margin`."""
    low, high = _narrowed(y - margin, out.dtype), _narrowed(margin.add_(y), out.dtype)
    out.copy_(low)
    bits = BITS[out.dtype]
    # As numbers of 64 bits they are compared in a fraction of the time.
    whole = torch.int64 if low.numel() * low.element_size() % 8 == 0 else bits
    if torch.equal(low.flatten().view(whole), high.flatten().view(whole)):
        return None
    return low.view(bits).ne(high.view(bits)).nonzero()


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.float().add_(0.0)
    return x if dtype == torch.float32 else x.type(dtype)


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
    margin = magnitude_n.mul_(_limits(terms.shape[-1])[1]).add_(y.abs(), alpha=11 * UNIT)
    out = torch.empty_like(y, dtype=dtype)
    doubt = _bracket(out, y, margin.masked_fill_(rest.eq(0).all(-1), 0.0))
    if doubt is not None:
        n = doubt.squeeze(1)
        out[n] = rounded(sliced_product(a_nK[n].unsqueeze(1), b_nK[n].unsqueeze(2)), torch.float32).to(dtype).flatten()
    return out

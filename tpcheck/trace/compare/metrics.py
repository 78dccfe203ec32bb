"""How far two tensors of one shape are apart, in the numbers that people look at and those that verdicts need."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpcheck.checkpoint.tiling import Array
from tpcheck.checkpoint.ulp import compare, values
from tpcheck.trace.compare.logical import Logical

__all__ = ["LEVELS", "Blocks", "Distance", "Numbers", "distance", "numbers"]

LEVELS = (1e-4, 1e-3, 5e-3, 1e-2)
BLOCK = 1 << 16  # elements widened to float64 at a time, which a cache holds
MOST_BLOCKS, FEWEST = 64, 64  # parts of a tensor; elements of a part
HALVES = (2, 4, 8)
MEDIAN_OF = 1 << 18  # elements that a median is taken of, evenly spaced


@dataclass(frozen=True)
class Blocks:
    """A tensor cut into groups of rows, or of columns: what B is off by in each.

    Attributes:
        error: squared norm of B - A.
        square: squared norm of A.
        scale: logarithm of the factor between B's norm and A's, over that of the whole tensor; in an estimate, how far
            rounding spreads it.
        size: elements of a group.
    """

    error: Array
    square: Array
    scale: Array
    size: int


@dataclass(frozen=True)
class Distance:
    """Of B from A, relative to A but for the median.

    Attributes:
        overall: by norms.
        peak: for the worst row, against A's root mean square row.
        coherent: how far a common factor takes A, as `scale` without its sign. Of independent roundings little is
            left in it, overall/√n of n elements; of a mistake that makes all of them a little too large, all of it.
        median: of the absolute difference of the elements, which the few that turn round do not reach.
        scale: logarithm of the factor between B's norm and A's. A regression of B on A, which are off alike: the
            factor of the reduced major axis, which errors in A do not bring below 1 as they do least squares.
        blocks: the same of parts.
    """

    overall: float
    peak: float
    coherent: float = 0.0
    median: float = 0.0
    scale: float = 0.0
    blocks: tuple[Blocks, ...] = ()


@dataclass(frozen=True)
class Numbers:
    """Everything that a table shows of a pair of tensors. `over` are fractions of elements above `LEVELS`;
    `scale` is the factor that takes A nearest to B, `coherent_scale` how far it is from 1; `ulp` is None for
    integers."""

    size: int
    differing: int
    nan: int
    max_abs: float
    mean_abs: float
    median_abs: float
    over: tuple[float, ...]
    relative: float
    peak: float
    cosine: float
    scale: float
    coherent_scale: float
    norm_a: float
    norm_b: float
    ulp: int | None


def distance(a: Logical, b: Logical) -> Distance:
    """The numbers that are compared with an estimate."""
    width = a.bits.shape[-1] if a.bits.ndim > 1 else 1
    rows: list[Array] = []
    columns = np.zeros((3, width))
    for x, y in _rows(a, b):
        off = y - x
        pairs = ((off, off), (x, off), (x, x))
        rows.append(np.stack([np.einsum("rc,rc->r", *pair) for pair in pairs]))
        columns += [np.einsum("rc,rc->c", *pair) for pair in pairs]
    by_row = np.concatenate(rows, 1) if rows else np.zeros((3, 0))
    error, along, norm = (float(one) for one in by_row.sum(1))
    scale = float(_log_scale(error, along, norm))
    peak = float(by_row[0].max(initial=0.0))
    return Distance(
        _ratio(error, norm),
        _ratio(peak, norm / max(by_row.shape[1], 1)),
        abs(scale),
        _median(a, b),
        scale,
        (*_blocks(by_row, width, scale), *_blocks(columns, by_row.shape[1], scale)),
    )


def _log_scale(error: Any, along: Any, norm: Any) -> Any:
    """½·log(|B|²/|A|²), from |B - A|², <A, B - A> and |A|²."""
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.where(norm > 0, (2 * along + error) / np.where(norm > 0, norm, 1.0), 0.0)
        return 0.5 * np.log1p(np.maximum(change, -1 + 1e-15))


def _blocks(sums: Array, each: int, whole: float) -> Iterator[Blocks]:
    """`sums` [3, n] of n rows, or columns, of `each` elements, put together to halves, quarters … as ranks have them,
    and to at most `MOST_BLOCKS` parts. `whole` is the factor of the whole tensor, of which theirs are counted."""
    count = sums.shape[1]
    most = min(MOST_BLOCKS, count, count * each // FEWEST)
    while most > 1 and count % most:
        most -= 1
    for groups in sorted({most, *(few for few in HALVES if few < most and not count % few)}):
        if groups > 1:
            error, along, norm = sums.reshape(3, groups, -1).sum(2)
            yield Blocks(error, norm, _log_scale(error, along, norm) - whole, each * (count // groups))


def _median(a: Logical, b: Logical) -> float:
    stride = -(-max(a.bits.size, 1) // MEDIAN_OF)
    x, y = (_wide(t.bits.reshape(-1)[::stride], t) for t in (a, b))
    with np.errstate(invalid="ignore"), warnings.catch_warnings():  # infinities apart; NaN alone
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(np.nan_to_num(np.nanmedian(np.abs(x - y)))) if len(x) else 0.0


def numbers(a: Logical, b: Logical, apart: Distance) -> Numbers:
    """All numbers, `apart` being the distance; NaN on a side counts as a difference and is left out of the others."""
    found = compare(iter([_bytes(a)]), iter([_bytes(b)]), a.dtype)
    dot = norm_a = norm_b = total = 0.0
    over = np.zeros(len(LEVELS))
    for x, y in _rows(a, b):
        error = np.abs(x - y)
        dot, total = dot + float(np.einsum("rc,rc->", x, y)), total + float(error.sum())
        norm_a, norm_b = (norm + float(np.einsum("rc,rc->", t, t)) for norm, t in ((norm_a, x), (norm_b, y)))
        over += [np.count_nonzero(error > level) for level in LEVELS]
    size = max(a.bits.size, 1)
    return Numbers(
        size=a.bits.size,
        differing=found.differing,
        nan=found.nan,
        max_abs=found.max_abs or 0.0,
        mean_abs=total / size,
        median_abs=apart.median,
        over=tuple(float(count) / size for count in over),
        relative=apart.overall,
        peak=apart.peak,
        cosine=dot / (norm_a * norm_b) ** 0.5 if norm_a and norm_b else float(norm_a == norm_b),
        scale=dot / norm_a if norm_a else float(not norm_b),
        coherent_scale=apart.coherent,
        norm_a=norm_a**0.5,
        norm_b=norm_b**0.5,
        ulp=found.max_ulp if found.differing else 0,
    )


def _rows(a: Logical, b: Logical) -> Iterator[tuple[Array, Array]]:
    """The tensors as matrices of their last dimension, some rows at a time, in float64; NaN and infinity as 0."""
    width = a.bits.shape[-1] if a.bits.ndim > 1 else 1
    x, y = a.bits.reshape(-1, width), b.bits.reshape(-1, width)
    step = max(1, BLOCK // width)
    for start in range(0, len(x), step):
        pair = []
        for side, bits in ((a, x), (b, y)):
            wide = _wide(bits[start : start + step], side)
            pair.append(wide if np.isfinite(wide).all() else np.nan_to_num(wide, nan=0.0, posinf=0.0, neginf=0.0))
        yield pair[0], pair[1]


def _wide(bits: Array, tensor: Logical) -> Array:
    return values(np.ascontiguousarray(bits), tensor.dtype) if tensor.floats else bits.astype(np.float64)


def _bytes(tensor: Logical) -> memoryview:
    return memoryview(np.ascontiguousarray(tensor.bits).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _ratio(square: float, norm: float) -> float:
    if not square:
        return 0.0
    return (square / norm) ** 0.5 if norm else float("inf")

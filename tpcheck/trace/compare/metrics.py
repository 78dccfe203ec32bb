"""How far two tensors of one shape are apart, in the numbers that people look at and those that verdicts need."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tpcheck.checkpoint.tiling import Array
from tpcheck.checkpoint.ulp import compare, values
from tpcheck.trace.compare.reader import Logical

__all__ = ["LEVELS", "Distance", "Numbers", "distance", "numbers"]

LEVELS = (1e-4, 1e-3, 5e-3, 1e-2)
BLOCK = 1 << 20  # elements widened to float64 at a time
MEDIAN_OF = 1 << 20  # elements that a median is taken of, evenly spaced


@dataclass(frozen=True)
class Distance:
    """Of B from A, relative to A.

    Attributes:
        overall: by norms.
        peak: for the worst row, against A's root mean square row.
        coherent: |s - 1|, where s·A is the multiple of A nearest to B. Of independent roundings little is left in
            it, overall/√n of n elements; of a mistake that makes all of them a little too large, all of it.
    """

    overall: float
    peak: float
    coherent: float = 0.0


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
    error = norm = peak = along = 0.0
    rows = 0
    for x, y in _rows(a, b):
        square, along = ((x - y) ** 2).sum(1), along + float((x * (y - x)).sum())
        error, norm, rows = error + float(square.sum()), norm + float((x * x).sum()), rows + len(x)
        peak = max(peak, float(square.max(initial=0.0)))
    return Distance(_ratio(error, norm), _ratio(peak, norm / max(rows, 1)), abs(along) / norm if norm else 0.0)


def numbers(a: Logical, b: Logical) -> Numbers:
    """All numbers; NaN on a side counts as a difference and is left out of the others."""
    found = compare(iter([_bytes(a)]), iter([_bytes(b)]), a.dtype)
    dot = norm_a = norm_b = total = 0.0
    over = np.zeros(len(LEVELS))
    for x, y in _rows(a, b):
        error = np.abs(x - y)
        dot, total = dot + float((x * y).sum()), total + float(error.sum())
        norm_a, norm_b = norm_a + float((x * x).sum()), norm_b + float((y * y).sum())
        over += [(error > level).sum() for level in LEVELS]
    apart, size = distance(a, b), max(a.bits.size, 1)
    stride = -(-size // MEDIAN_OF)
    x, y = (_wide(t.bits.reshape(-1)[::stride], t) for t in (a, b))
    with np.errstate(invalid="ignore"), warnings.catch_warnings():  # infinities apart; NaN alone
        warnings.simplefilter("ignore", RuntimeWarning)
        median = float(np.nanmedian(np.abs(x - y))) if len(x) else 0.0
    return Numbers(
        size=a.bits.size,
        differing=found.differing,
        nan=found.nan,
        max_abs=found.max_abs or 0.0,
        mean_abs=total / size,
        median_abs=median,
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
            pair.append(np.nan_to_num(wide, nan=0.0, posinf=0.0, neginf=0.0))
        yield pair[0], pair[1]


def _wide(bits: Array, tensor: Logical) -> Array:
    return values(np.ascontiguousarray(bits), tensor.dtype) if tensor.floats else bits.astype(np.float64)


def _bytes(tensor: Logical) -> memoryview:
    return memoryview(np.ascontiguousarray(tensor.bits).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _ratio(square: float, norm: float) -> float:
    if not square:
        return 0.0
    return (square / norm) ** 0.5 if norm else float("inf")

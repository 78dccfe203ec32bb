"""Whether a tensor of B is farther from A's than rounding explains, by six measures; and how small an error shows.

overall, worst row     norms                          any large error
median                 of absolute differences        an error of all elements that a few outliers hide
coherent               a common factor                an error of all elements that each one's rounding hides
parts                  the same of rows and columns   one head, one expert, one rank's part
mantissas              float32 that fit in bfloat16   a rounding too much
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tpcheck.checkpoint.tiling import Array
from tpcheck.trace.compare.logical import Key, Logical
from tpcheck.trace.compare.metrics import Blocks, Distance, Numbers

__all__ = ["Excess", "allowed", "excess", "limit", "rounded_too_much"]

# Over TP, DP, SP, recomputation and accumulation in both dtypes, clean runs reach 0.2 to 1.6 estimates; what silent
# bugs do first is 10 estimates and more in bfloat16, 1000 and more in float32.
SAFETY = 3.0
FEW = 4.0  # an estimate from few numbers is itself uncertain: SAFETY grows by FEW / sqrt(how many numbers it is from)
PEAK_SAFETY = 2.0  # a worst row varies more than a mean
MEDIAN_SAFETY = 4.0  # clean runs reach 2.35
COHERENT_SAFETY = 8.0  # standard deviations, of which some hundred tensors are within 5
PART_SAFETY = 2.0  # a worst part of a hundred varies more than a whole
PART_AT_LEAST = 0.3  # of a tensor's own noise, relative: what a part is taken to have where its own is less
ENOUGH = 32  # elements, to say that all of them are rounded
# Kinds that elements turning round dominate: neither parts nor a common factor says anything of them.
TURNING = ("weight", "state.main", "start", "resumed.main")


@dataclass(frozen=True)
class Excess:
    """The measure that is farthest over what is allowed, above 1 if it is not rounding, and what is said if so."""

    value: float
    why: str = ""


def allowed(size: int, seeds: int) -> float:
    """How many times the estimate a tensor of `size` elements may be off."""
    return SAFETY * (1 + FEW / math.sqrt(max(size, 1) * max(seeds, 1)))


def excess(
    key: Key, found: Numbers, apart: Distance, expected: Distance | None, seeds: int, parts: bool = True
) -> Excess:
    """The distance `apart` over what is allowed, given how far rounding is expected to go; `parts` may say nothing
    where one element of a part may be dropped that outweighs all others."""
    if found.nan or math.isinf(found.max_abs):  # infinities are left out of the distances
        return Excess(math.inf)
    if expected is None:
        return Excess(0.0)
    times = allowed(found.size, seeds)
    plain = Excess(
        max(_over(apart.overall, times * expected.overall), _over(apart.peak, PEAK_SAFETY * times * expected.peak))
    )
    every = [
        plain,
        _median(apart, expected, found.size, seeds),
    ]
    if key.kind not in TURNING:
        every.append(_coherent(apart, expected))
    if parts and key.kind not in (*TURNING, "update"):
        every += [_parts(*one, expected.overall, seeds) for one in zip(apart.blocks, expected.blocks, strict=False)]
    worst = max(every, key=lambda one: one.value)
    return worst if plain.value <= 1 else Excess(worst.value)  # what anybody sees needs no word of how


def limit(expected: Distance, size: int, seeds: int) -> tuple[float, float]:
    """The smallest error, relative to the tensor, that is found: of any kind, and of a factor common to all of it."""
    return allowed(size, seeds) * expected.overall, COHERENT_SAFETY * expected.coherent


def rounded_too_much(key: Key, a: Logical, b: Logical, addends: int) -> str:
    """What is said of a float32 tensor whose every number fits in bfloat16, where the other side's do not.

    A gradient that is one bfloat16 result, and no sum of several (`addends`), rightly fits.
    """
    if a.dtype != "float32" or b.dtype != "float32" or key.kind.partition(".")[0] not in ("grad", "state", "resumed"):
        return ""
    if key.kind == "grad" and (addends < 2 or ".experts." in key.name):  # an expert may have one rank's tokens alone
        return ""
    kept = (a.bits != 0) & (b.bits != 0)
    if kept.sum() < ENOUGH:
        return ""
    coarse_a, coarse_b = (float((t.bits[kept] & 0xFFFF == 0).mean()) for t in (a, b))
    return "rounded to bfloat16 on the way: every number fits in it" if coarse_b > 0.99 and coarse_a < 0.5 else ""


def _over(value: float, bound: float) -> float:
    return 0.0 if not value else value / bound if bound else math.inf


def _median(apart: Distance, expected: Distance, size: int, seeds: int) -> Excess:
    bound = MEDIAN_SAFETY / SAFETY * allowed(size, seeds) * expected.median
    value = _over(apart.median, bound)
    times = apart.median / expected.median if expected.median else math.inf
    return Excess(value, f"half of its elements are off by {times:.2g} times what rounding does to half of them")


def _coherent(apart: Distance, expected: Distance) -> Excess:
    said = f"a common factor of {math.exp(apart.scale):.6g}, where rounding explains 1 ± {expected.coherent:.1g}"
    return Excess(_over(apart.coherent, COHERENT_SAFETY * expected.coherent), said)


def _parts(found: Blocks, expected: Blocks, whole: float, seeds: int) -> Excess:
    """The worst part, by distance and by common factor; `whole` is the noise of the whole tensor, relative."""
    if found.error.shape != expected.error.shape or found.size != expected.size:
        return Excess(0.0)
    times, count = allowed(found.size, seeds), len(found.error)
    noise = np.sqrt(expected.error)  # of each part
    noise = np.maximum(noise, PART_AT_LEAST * whole * np.sqrt(found.square))
    distances = _each_over(np.sqrt(found.error), PART_SAFETY * times * noise)
    relative = np.divide(noise, np.sqrt(found.square), out=np.full(count, np.inf), where=found.square > 0)
    spread = np.maximum(np.maximum(expected.scale, relative / math.sqrt(found.size)), relative**2 / 2)
    factors = _each_over(np.abs(found.scale), COHERENT_SAFETY * times / SAFETY * spread)
    worst = int(np.argmax(np.maximum(distances, factors)))
    value = float(max(distances[worst], factors[worst]))
    several = int((np.maximum(distances, factors) > 1).sum())
    off = math.sqrt(found.error[worst] / found.square[worst]) if found.square[worst] else math.inf
    factor = math.exp(found.scale[worst])
    said = f"part {worst + 1} of {count} is off by {off:.2g}, a factor of {factor:.4g} more than the whole"
    return Excess(value, said + (f"; so are {several - 1} others" if several > 1 else ""))


def _each_over(values: Array, bounds: Array) -> Array:
    over = np.divide(values, bounds, out=np.full(values.shape, np.inf), where=bounds > 0)
    return np.where(values > 0, np.nan_to_num(over, nan=0.0, posinf=np.inf), 0.0)

"""What dropout drops: 0 kept, 1 dropped, 2 zero before, so that nothing can be seen. Older traces have no 2."""

from __future__ import annotations

import math

from tpcheck.trace.compare.logical import Logical

__all__ = ["dropped_apart", "rates_apart", "same_mask"]

RATE_SAFETY = 8.0  # standard deviations of how many elements are dropped


def dropped_apart(x: Logical, y: Logical) -> bool:
    """Whether two masks differ; an element that was zero before dropout (2) says nothing."""
    return bool(((x.bits != y.bits) & (x.bits < 2) & (y.bits < 2)).any())


def rates_apart(x: Logical, y: Logical) -> str:
    """What is said where one side drops more elements than chance explains."""
    known = [one.bits[one.bits < 2] for one in (x, y)]
    rates = [float((one == 1).mean()) if one.size else 0.0 for one in known]
    mean = (rates[0] + rates[1]) / 2
    spread = math.sqrt(mean * (1 - mean) * sum(1 / max(one.size, 1) for one in known))
    if abs(rates[0] - rates[1]) <= RATE_SAFETY * spread:
        return ""
    return f"{rates[1]:.1%} of the elements are dropped in B, {rates[0]:.1%} in A: another dropout probability"


def same_mask(side: str, mask: Logical) -> str:
    """Ranks that drop the same elements of different shards; data-parallel ranks may."""
    seen: dict[tuple[object, bytes], tuple[int, tuple[slice, ...]]] = {}
    for rank, box in mask.ranks:
        dropped = mask.bits[box]
        sample = repr(box[mask.batch]) if mask.batch is not None else ""
        first, place = seen.setdefault((sample, dropped.tobytes()), (rank, box))
        if place != box and (dropped == 1).any() and (dropped == 0).any():
            return f"in {side}, ranks {first} and {rank} drop the same elements of different shards: equal seeds"
    return ""

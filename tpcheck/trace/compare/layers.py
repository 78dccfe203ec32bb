"""A common factor over all layers and steps, where each tensor's own is within what rounding explains.

factor of each tensor, in units of its spread   z₁ … zₙ     mean z·√n: rounding's averages out, a bug's does not
the same of every nudged run                                by how much more than independent ones theirs do
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tpcheck.trace.compare.comparison import Row
from tpcheck.trace.compare.estimate import Estimate
from tpcheck.trace.compare.excess import COHERENT_SAFETY, TURNING
from tpcheck.trace.module_names import role_of

__all__ = ["together"]

FEWEST = 4  # tensors


def together(rows: Sequence[Row], estimate: Estimate) -> list[Row]:
    """`rows`, the first of those suspect that are off by one factor together."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        usable = row.verdict == "rounding" and row.key.kind not in TURNING and row.key not in estimate.systematic
        if usable and row.estimate and row.apart:
            for role in {role_of(row.key.name), ""}:
                groups.setdefault((row.key.kind, role), []).append(place)
    changed = list(rows)
    for (kind, role), places in groups.items():
        if len(places) < FEWEST or kind in ("clip", "loss"):
            continue
        mean, spread = _mean([rows[place] for place in places], estimate)
        if abs(mean) > COHERENT_SAFETY * spread:
            first = places[0]
            of = f"all {len(places)} tensors of this role" if role else f"all {len(places)} tensors of this kind"
            why = f"{of} are a factor of {math.exp(mean):.6g} off together, where rounding explains 1 ± {spread:.1g}"
            if changed[first].verdict != "suspect":
                over = abs(mean) / (COHERENT_SAFETY * spread)
                changed[first] = replace(changed[first], verdict="suspect", why=why, excess=over)
    return changed


def _mean(rows: Sequence[Row], estimate: Estimate) -> tuple[float, float]:
    """The mean logarithm of the factors, weighted by their spreads, and the spread of that."""
    spreads = np.array([row.estimate.coherent for row in rows])  # type: ignore[union-attr]
    weights = np.where(spreads > 0, 1 / np.maximum(spreads, 1e-300) ** 2, 0.0)
    total = weights.sum()
    if not total:
        return 0.0, math.inf
    factors = np.array([row.apart.scale for row in rows])  # type: ignore[union-attr]
    runs = [estimate.runs(row.key) for row in rows]
    seeds = min(map(len, runs))
    theirs = [float((weights * [run[seed].scale for run in runs]).sum() / total) for seed in range(seeds)]
    independent = float(1 / math.sqrt(total))
    spread = max(independent, math.sqrt(sum(one * one for one in theirs) / seeds) if seeds else 0.0)
    # Three runs leave it uncertain where their tensors go together.
    return float((weights * factors).sum() / total), max(spread, 0.5 * max(map(abs, theirs), default=0.0))

"""A common factor over all layers and steps, of whole tensors or of one part of each, where each tensor's own is within
what rounding explains.

factor of each tensor, in units of its spread   z₁ … zₙ     mean z·√n: rounding's averages out, a bug's does not
the same of every nudged run                                by how much more than independent ones theirs do
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
        group = [rows[place] for place in places]
        found = [("", *_mean(group, estimate)), *(_of_parts(group) if role and kind != "update" else ())]
        part, mean, spread = max(found, key=lambda one: abs(one[1]) / one[2])
        over = abs(mean) / (COHERENT_SAFETY * spread)
        if over > 1 and changed[places[0]].verdict != "suspect":
            of = f"{part}all {len(places)} tensors of this {'role' if role else 'kind'}"
            more = " more than the rest of them" if part else ""
            factor = f"a factor of {math.exp(mean):.6g} off together{more}"
            why = f"{of} are {factor}, where rounding explains 1 ± {spread:.1g}"
            changed[places[0]] = replace(changed[places[0]], verdict="suspect", why=why, excess=over)
    return changed


def _of_parts(rows: Sequence[Row]) -> Iterator[tuple[str, float, float]]:
    """Of every part that all tensors have: what it is, the mean logarithm of its factor, and the spread of that."""
    for held in zip(*(zip(row.apart.blocks, row.estimate.blocks, strict=False) for row in rows), strict=False):  # type: ignore[union-attr]
        if len({(found.scale.shape, expected.scale.shape) for found, expected in held}) != 1:
            continue
        factors, spreads = (np.array([one[side].scale for one in held]) for side in (0, 1))
        known = np.asarray((spreads > 0).all(0))
        weights = 1 / np.where(spreads > 0, spreads, 1.0) ** 2
        mean, spread = (weights * factors).sum(0) / weights.sum(0), weights.sum(0) ** -0.5
        worst = int(np.argmax(np.where(known, np.abs(mean) / spread, 0.0)))
        if known[worst]:
            yield f"part {worst + 1} of {mean.size} of ", float(mean[worst]), float(spread[worst])


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

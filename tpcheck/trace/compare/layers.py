"""A common factor over all layers and steps, where that of each tensor alone is within what rounding explains.

It is looked for in whole tensors and in one part of each:

factor of each tensor, in units of its spread   z₁ … zₙ     mean z·√n: rounding's averages out, a bug's does not
the same of every nudged run                                by how much more than independent ones theirs do

Nudged runs may be noisier than B, whose roundings are then known from what most of its tensors of a kind are off by: a
tensor that is off by a factor stands out from them earlier than from the nudged runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from tpcheck.trace.compare.comparison import Row
from tpcheck.trace.compare.estimate import Estimate, spread_of
from tpcheck.trace.compare.excess import COHERENT_SAFETY, TURNING
from tpcheck.trace.module_names import role_of

__all__ = ["together"]

FEWEST = 4  # tensors of a role or kind; one of a name is enough
ENOUGH = 8  # tensors, to say how large B's roundings are
QUIETEST = 0.25  # of the nudged runs' roundings: with less than that of its own, B may still have theirs at one place
# Whose roundings are one operation's or a few; an optimizer's state is scaled by a coefficient that all tensors share.
COMPUTED = ("in", "out", "dout", "din", "grad")


def together(rows: Sequence[Row], estimate: Estimate, parts: bool = True) -> list[Row]:
    """`rows`, those suspect that are off by a factor in all their steps; then, of what is left, the first of those of
    one role or kind that are off by one together."""
    changed, levels = list(rows), _levels(rows)
    for which in ("name", "role", "kind"):
        for places in _groups(changed, estimate, which):
            group = [changed[place] for place in places]
            level = max(min(1.0, max(levels.get((row.key.kind, row.key.step), 1.0), _level(row))) for row in group)
            level = max(level, QUIETEST)
            found = [("", *_mean(group, estimate, level))]
            if parts and which != "kind" and group[0].key.kind != "update" and len(group) > 1:
                found += _of_parts(group)
            part, mean, spread = max(found, key=lambda one: abs(one[1]) / one[2])
            over = abs(mean) / (COHERENT_SAFETY * spread)
            if over > 1:
                held = f"{part}all {len(group)} tensors of this {which}" if len(group) > 1 else "all elements"
                factor = f"a factor of {math.exp(mean):.6g} off together{' more than the rest of them' if part else ''}"
                why = f"{held} are {factor}, where rounding explains 1 ± {spread:.1g}"
                changed[places[0]] = replace(group[0], verdict="suspect", why=why, excess=over)
    return changed


def _groups(rows: Sequence[Row], estimate: Estimate, which: str) -> list[list[int]]:
    """Places of the rows that have one name, role or kind, and are not suspect by themselves."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        judged = row.verdict == "rounding" and row.estimate is not None and row.apart is not None
        if judged and row.key.kind not in (*TURNING, "clip", "loss") and row.key not in estimate.systematic:
            of = {"name": row.key.name, "role": role_of(row.key.name), "kind": ""}[which]
            groups.setdefault((row.key.kind, of), []).append(place)
    return [places for places in groups.values() if which == "name" or len(places) >= FEWEST]


def _level(row: Row) -> float:
    """How large B's roundings are against the nudged runs', its common factor left out."""
    assert row.apart is not None and row.estimate is not None
    left = math.sqrt(max(row.apart.overall**2 - row.apart.coherent**2, 0.0))
    return left / row.estimate.overall if row.estimate.overall else 1.0


def _levels(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    """The same of half of the tensors of a kind and step, where they are enough."""
    every: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row.estimate and row.apart and row.key.kind in COMPUTED and row.verdict in ("rounding", "suspect"):
            every.setdefault((row.key.kind, row.key.step), []).append(_level(row))
    return {key: float(np.median(found)) for key, found in every.items() if len(found) >= ENOUGH}


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


def _mean(rows: Sequence[Row], estimate: Estimate, level: float) -> tuple[float, float]:
    """The mean logarithm of the factors, weighted by their spreads, and the spread of that in a run whose roundings are
    `level` times the nudged runs'."""
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
    spread = max(independent, spread_of(theirs))
    # Three runs leave it uncertain where their tensors go together.
    return float((weights * factors).sum() / total), level * max(spread, 0.5 * max(map(abs, theirs), default=0.0))

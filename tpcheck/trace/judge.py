"""Identical, rounding or suspect: every tensor of B against the same one of A and what rounding may do to it.

    A ──► distance of B from A ──► above SAFETY × the estimate?  ──► suspect
    nudged runs of A ──► estimate ──────┘          or replicas unequal, or recomputed otherwise

The first suspect is the first in the order in which a step computes: forward, backward, gradients, optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tpcheck.trace.estimate import ROUNDING, Estimate
from tpcheck.trace.metrics import Distance, Numbers, numbers
from tpcheck.trace.mistakes import explain
from tpcheck.trace.names import layer_of
from tpcheck.trace.reader import Key, Logical, Replicas, Trace

__all__ = ["Comparison", "Row", "Verdict", "judge"]

Verdict = Literal["identical", "rounding", "suspect", "unknown"]
# Clean runs stay below 1 for most tensors and reach 3 to 4 for sums of few numbers that cancel; bugs begin at 20.
SAFETY = 5.0
FEW = 4.0  # an estimate from few numbers is itself uncertain: SAFETY grows by FEW / sqrt(how many numbers it is from)
PEAK_SAFETY = 2.0  # a worst row varies more than a mean


@dataclass(frozen=True)
class Row:
    """One logical tensor of both traces.

    Attributes:
        estimate: how far rounding may take it; None where nothing has been estimated.
        excess: the distance over what is allowed; above 1 it is suspect.
        why: what makes it suspect, for the first and for those that are suspect for another reason than distance.
    """

    key: Key
    dtype: str
    shape: tuple[int, ...]
    numbers: Numbers
    estimate: Distance | None
    excess: float
    verdict: Verdict
    why: str = ""

    @property
    def layer(self) -> int | None:
        return layer_of(self.key.name)


@dataclass
class Comparison:
    """What `judge` found, rows in execution order; `unmapped` says what could not be compared, and why."""

    a: Trace
    b: Trace
    rows: list[Row] = field(default_factory=list)
    unmapped: list[str] = field(default_factory=list)

    @property
    def first(self) -> Row | None:
        """The first suspect."""
        return next((row for row in self.rows if row.verdict == "suspect"), None)

    @property
    def first_difference(self) -> Row | None:
        return next((row for row in self.rows if row.verdict != "identical"), None)

    @property
    def verdict(self) -> Verdict:
        found = {row.verdict for row in self.rows}
        order: tuple[Verdict, ...] = ("suspect", "unknown", "rounding")
        return next((verdict for verdict in order if verdict in found), "identical")


def judge(a: Trace, b: Trace, estimate: Estimate) -> Comparison:
    """Compare all that both traces have of the steps both have."""
    comparison = Comparison(a, b)
    steps = set(a.steps) & set(b.steps)
    explained = False
    for key in _in_order(a, b):
        if key.step not in steps:
            continue
        row = _row(key, a, b, estimate, comparison.unmapped, explained)
        if row is not None:
            comparison.rows.append(row)
            explained |= row.verdict == "suspect"
    return comparison


def _in_order(a: Trace, b: Trace) -> Iterator[Key]:
    """Keys as A meets them, what only B has (recomputation, mostly) where B meets it."""
    orders = {**b.order, **a.order}
    return iter(sorted(orders, key=lambda key: (orders[key], key)))


def _row(key: Key, a: Trace, b: Trace, estimate: Estimate, unmapped: list[str], explained: bool) -> Row | None:
    if key.kind == "again":
        return _recomputed(key, a, b, estimate)
    if key not in a.records or key not in b.records:
        unmapped.append(f"{_name(key)} is only in {'A' if key in a.records else 'B'}")
        return None
    x, y = a.logical(key), b.logical(key)
    for side, tensor in (("A", x), ("B", y)):
        if isinstance(tensor, str):
            unmapped.append(f"{_name(key)} in {side}: {tensor}")
            return None
    assert isinstance(x, Logical) and isinstance(y, Logical)
    if x.bits.shape != y.bits.shape:
        unmapped.append(f"{_name(key)}: {list(x.bits.shape)} in A, {list(y.bits.shape)} in B")
        return None
    other_dtype = f"{y.dtype} where A has {x.dtype}" if x.dtype != y.dtype else ""
    if other_dtype:
        x, y = x.widened(), y.widened()
    unequal = _unequal(key, a, b, x, y, estimate)
    found = numbers(x, y)
    if not found.differing and not unequal and not other_dtype:
        return Row(key, x.dtype, x.bits.shape, found, None, 0.0, "identical")
    if not x.floats:
        return Row(key, x.dtype, x.bits.shape, found, None, math.inf, "suspect", unequal or "other integers")
    expected = estimate.of(key, x) if estimate else None
    excess = _excess(found, expected, len(estimate.noise)) if expected else math.inf if found.nan else 0.0
    if unequal or other_dtype or excess > 1:
        why = "; ".join(filter(None, (unequal, other_dtype)))
        if not explained:
            near = _allowed(found, len(estimate.noise)) * expected.overall if expected else 0.0
            why = "; ".join(filter(None, (why, explain(key, x, y, a, b, found, near))))
        return Row(key, x.dtype, x.bits.shape, found, expected, excess, "suspect", why)
    return Row(key, x.dtype, x.bits.shape, found, expected, excess, "rounding" if expected else "unknown")


def _allowed(found: Numbers, seeds: int) -> float:
    """How many times the estimate a tensor may be off."""
    return SAFETY * (1 + FEW / math.sqrt(found.size * seeds))


def _excess(found: Numbers, expected: Distance, seeds: int) -> float:
    if found.nan:
        return math.inf
    allowed = _allowed(found, seeds)
    return max(found.relative / (allowed * expected.overall), found.peak / (PEAK_SAFETY * allowed * expected.peak))


def _unequal(key: Key, a: Trace, b: Trace, x: Logical, y: Logical, estimate: Estimate) -> str:
    """What is said of ranks that hold different values for the same thing, if that is more than rounding."""
    for side, tensor in (("A", x), ("B", y)):
        replicas = tensor.replicas
        if replicas is None:
            continue
        if key.kind in ("start", "weight", "input") or key.kind.startswith("state"):
            allowed = 0.0  # what is kept from step to step drifts apart for good
        elif key.kind == "clip":
            allowed = 64 * ROUNDING["float32"]  # each rank works it out from its own shards
        else:
            allowed = estimate.of(key, x).overall if estimate else ROUNDING.get(tensor.dtype, 0.0)
        if not replicas.distance <= allowed:
            return _said(side, replicas, x, tensor)
    return ""


def _said(side: str, replicas: Replicas, reference: Logical, tensor: Logical) -> str:
    ranks = ", ".join(map(str, replicas.others[:8]))
    text = f"unequal replicas in {side}: ranks {ranks} hold other values than rank {replicas.first}"
    text += f" (by {replicas.distance:.2g})"
    return text


def _recomputed(key: Key, a: Trace, b: Trace, estimate: Estimate) -> Row | None:
    """Recomputation, against what the same trace has computed in the forward pass; A's is not B's reference."""
    before = Key(key.step, "out", key.name)
    for side, trace in (("A", a), ("B", b)):
        if key not in trace.records or before not in trace.records:
            continue
        x, y = trace.logical(before), trace.logical(key)
        if isinstance(x, str) or isinstance(y, str) or x.bits.shape != y.bits.shape:
            continue
        found = numbers(x, y)
        if not found.differing:
            continue
        expected = estimate.of(before, x) if estimate and before in a.records else None
        bound = expected or Distance(ROUNDING.get(x.dtype, 0.0), ROUNDING.get(x.dtype, 0.0))
        excess = max(found.relative / bound.overall, found.peak / bound.peak) if not found.nan else math.inf
        why = f"recomputation in {side} gives other values than the forward pass did" if excess > 1 else ""
        return Row(key, x.dtype, x.bits.shape, found, expected, excess, "suspect" if why else "rounding", why)
    return None


def _name(key: Key) -> str:
    return f"step {key.step} {key.kind} {key.name}"

"""Identical, rounding or suspect: every tensor of B against the same one of A and what rounding may do to it.

    A ──► distance of B from A ──► above SAFETY × the estimate?  ──► suspect
    nudged runs of A ──► estimate ──────┘          or replicas unequal, or recomputed otherwise,
                                                   or a weight that is not its main parameter, rounded

Where most of what was drawn at random starts otherwise in B, the runs are not of one function: nothing after it is
judged, but for what a trace shows by itself. So with losses and gradients if vocabularies are padded differently.

Distance is overall, in the worst row, and coherent: all elements too large, or too small, by one factor. The latter
finds what hides below the rounding of each single element, as an epsilon of 1e-5 for 1e-6 does in bfloat16.

The first suspect is the first in the order in which a step computes: forward, backward, gradients, optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from tpcheck.trace.compare.diagnose import adds_up, explain
from tpcheck.trace.compare.estimate import GRADIENT_NORM, ROUNDING, Estimate
from tpcheck.trace.compare.metrics import Distance, Numbers, numbers
from tpcheck.trace.compare.reader import Key, Logical, Trace, encoded
from tpcheck.trace.module_names import layer_of

__all__ = ["Comparison", "Row", "Verdict", "judge"]

Verdict = Literal["identical", "rounding", "suspect", "other weights", "other vocabulary", "unknown"]
# Over TP, DP, SP, recomputation and accumulation in both dtypes, clean runs reach 0.2 to 1.6 estimates; what silent
# bugs do first is 10 estimates and more in bfloat16, 1000 and more in float32.
SAFETY = 3.0
FEW = 4.0  # an estimate from few numbers is itself uncertain: SAFETY grows by FEW / sqrt(how many numbers it is from)
PEAK_SAFETY = 2.0  # a worst row varies more than a mean
BEFORE_SOFTMAX = ("start", "input", "out", "mask", "again")  # of a step; the model's own output is its losses
COHERENT_SAFETY = 4.0  # clean runs reach 4 estimates of it, FEW allowed for; the epsilon of another model is at 63


@dataclass(frozen=True)
class Row:
    """One logical tensor of both traces.

    Attributes:
        estimate: how far rounding may take it; None where nothing has been estimated.
        excess: the distance over what is allowed, of the three the most; above 1 it is suspect.
        why: what makes it suspect, for the first and for those that are suspect for another reason than distance.
        by_itself: B's, or A's, is wrong whatever the other has, as unequal replicas are.
    """

    key: Key
    dtype: str
    shape: tuple[int, ...]
    numbers: Numbers
    estimate: Distance | None
    excess: float
    verdict: Verdict
    why: str = ""
    by_itself: bool = False

    @property
    def layer(self) -> int | None:
        return layer_of(self.key.name)


@dataclass
class Comparison:
    """What `judge` found, rows in execution order; `unmapped` says what could not be compared, and why.

    `vocabulary` are the sizes that A and B pad theirs to, where they differ; `drawn`, how many parameters start with
    values that are drawn at random, known where some start otherwise.
    """

    a: Trace
    b: Trace
    vocabulary: tuple[int, int] | None = None
    drawn: int = 0
    rows: list[Row] = field(default_factory=list)
    unmapped: list[str] = field(default_factory=list)

    @property
    def first(self) -> Row | None:
        """The first suspect."""
        return next((row for row in self.rows if row.verdict == "suspect"), None)

    @property
    def other_weights(self) -> list[Row]:
        """The parameters that start otherwise, if the runs are not of one model for it."""
        return [row for row in self.rows if row.verdict == "other weights"]

    @property
    def first_difference(self) -> Row | None:
        return next((row for row in self.rows if row.verdict != "identical"), None)

    @property
    def verdict(self) -> Verdict:
        found = {row.verdict for row in self.rows}
        order: tuple[Verdict, ...] = (
            "suspect", "other weights", "other vocabulary", "unknown", "rounding", "identical",
        )  # fmt: skip
        return next((verdict for verdict in order if verdict in found), "unknown")


def judge(a: Trace, b: Trace, estimate: Estimate, vocabulary: tuple[int, int] | None = None) -> Comparison:
    """Compare all that both traces have of the steps both have; `vocabulary` as in `Comparison`."""
    return _Judge(a, b, estimate, vocabulary).compare()


class _Judge:
    """Goes through the tensors in order; remembers what the ones before have shown."""

    def __init__(self, a: Trace, b: Trace, estimate: Estimate, vocabulary: tuple[int, int] | None) -> None:
        self.a, self.b, self.estimate = a, b, estimate
        self.result = Comparison(a, b, vocabulary)
        self.redrawn = False  # B drops other elements than A, or starts from other weights: nothing after can agree
        self.started = self.softmaxed = False  # past the initial weights; past a softmax over another vocabulary

    def compare(self) -> Comparison:
        steps = set(self.a.steps) & set(self.b.steps)
        # What only B has, recomputation mostly, comes where B meets it.
        orders = {**self.b.order, **self.a.order}
        for key in sorted(orders, key=lambda key: (orders[key], key)):
            if key.step in steps:
                if key.kind != "start" and not self.started:
                    self._start()
                self.softmaxed |= self.result.vocabulary is not None and (
                    key.kind not in BEFORE_SOFTMAX or key.name == "model"
                )
                row = self._recomputed(key) if key.kind == "again" else self._row(key)
                self.result.rows += [row] if row else []
        if not self.started:
            self._start()
        return self.result

    def _start(self) -> None:
        """Once all initial weights are known: where most of the drawn ones differ, none of them is the suspect."""
        self.started, rows = True, self.result.rows
        other = [row for row in rows if row.verdict == "suspect" and row.key.step == 0 and not row.by_itself]
        if not other:
            return
        drawn = [row for row in rows if row.verdict != "identical" or not self._constant(row.key)]
        self.result.drawn = len(drawn)
        if len(other) > len(drawn) / 2:
            self.redrawn = True
            self.result.rows = [replace(row, verdict="other weights") if row in other else row for row in rows]

    def _constant(self, key: Key) -> bool:
        found = self.a.logical_or_none(key)
        return found is not None and bool((found.bits == found.bits.reshape(-1)[:1]).all())

    def _row(self, key: Key) -> Row | None:
        pair = self._pair(key)
        if pair is None:
            return None
        x, y = pair
        other_dtype = f"{y.dtype} where A has {x.dtype}" if x.dtype != y.dtype else ""
        if other_dtype:
            x, y = x.widened(), y.widened()
        unequal = self._unequal(key, x, y)
        wrong = "; ".join(filter(None, (unequal, self._not_copied(key), other_dtype)))
        found = numbers(x, y)

        def row(verdict: Verdict, why: str = "", expected: Distance | None = None, excess: float = 0.0) -> Row:
            return Row(key, x.dtype, x.bits.shape, found, expected, excess, verdict, why, bool(wrong))

        if key.kind == "mask":
            self.redrawn |= bool(found.differing)
            wrong = wrong or _same_mask("A", x) or _same_mask("B", y)
            return row("suspect" if wrong else "unknown" if found.differing else "identical", wrong)
        if not found.differing and not wrong:
            return row("identical")
        if not x.floats:
            return row("suspect", wrong or "other integers", excess=math.inf)
        if self.redrawn:
            return row("suspect" if wrong else "unknown", wrong)
        # What a run starts from has not been computed, so that no nudged run is needed to tell.
        expected = self.estimate.of(key, x) if self.estimate or key.kind == "start" else None
        excess, coherent = _excess(found, expected, len(self.estimate.noise))
        if excess <= 1 and not wrong:
            if key.kind == "clip":
                self.estimate.clips_apart(found.relative)
            return row("rounding" if expected else "unknown", "", expected, excess)
        if self.softmaxed and not wrong:
            return row("other vocabulary", "", expected, excess)
        if excess > 1 and self.result.first is None:
            near = _allowed(found, len(self.estimate.noise)) * expected.overall if expected else 0.0
            coherent = coherent or explain(key, x, y, self.a, self.b, found, near)
        return row("suspect", "; ".join(filter(None, (wrong, coherent))), expected, excess)

    def _pair(self, key: Key) -> tuple[Logical, Logical] | None:
        """Both sides of `key`; notes why it cannot be compared, if so."""
        notes = self.result.unmapped
        if key not in self.a.records or key not in self.b.records:
            notes.append(f"{_name(key)} is only in {'A' if key in self.a.records else 'B'}")
            return None
        x, y = self.a.logical(key), self.b.logical(key)
        for side, tensor in (("A", x), ("B", y)):
            if isinstance(tensor, str):
                notes.append(f"{_name(key)} in {side}: {tensor}")
        if isinstance(x, str) or isinstance(y, str):
            return None
        if x.bits.shape != y.bits.shape:
            notes.append(f"{_name(key)}: {list(x.bits.shape)} in A, {list(y.bits.shape)} in B")
            return None
        return x, y

    def _unequal(self, key: Key, x: Logical, y: Logical) -> str:
        """What is said of ranks that hold different values for the same thing, if that is more than rounding."""
        for side, tensor in (("A", x), ("B", y)):
            replicas = tensor.replicas
            if replicas is not None and not replicas.distance <= self._drift(key, x):
                ranks = ", ".join(map(str, replicas.others[:8]))
                text = f"unequal replicas in {side}: ranks {ranks} hold other values than rank {replicas.first}"
                sums = adds_up(x, y) if side == "B" else ""
                return f"{text} (by {replicas.distance:.2g}){'; ' if sums else ''}{sums}"
        return ""

    def _not_copied(self, key: Key) -> str:
        """What is said of a trace whose weight is not its optimizer's main parameter, rounded."""
        if key.kind != "weight":
            return ""
        for side, trace in (("A", self.a), ("B", self.b)):
            weight, main = trace.logical_or_none(key), trace.logical_or_none(key._replace(kind="state.main"))
            if weight is None or main is None or not weight.floats or weight.bits.shape != main.bits.shape:
                continue
            if wrong := int((encoded(main.values(), weight.dtype) != weight.bits).sum()):
                return f"{wrong} elements in {side} are not their main parameters, rounded: not copied to the model"
        return ""

    def _drift(self, key: Key, x: Logical) -> float:
        """How far apart replicas may be."""
        if key.kind in ("start", "weight", "input", "mask") or key.kind.startswith("state"):
            return 0.0  # what is kept from step to step drifts apart for good
        if key.kind == "clip":
            return GRADIENT_NORM  # each rank works it out from its own shards
        return self.estimate.of(key, x).overall if self.estimate else ROUNDING.get(x.dtype, 0.0)

    def _recomputed(self, key: Key) -> Row | None:
        """Recomputation, against what the same trace has computed in the forward pass."""
        before = Key(key.step, "out", key.name)
        for side, trace in (("A", self.a), ("B", self.b)):
            x, y = trace.logical_or_none(before), trace.logical_or_none(key)
            if x is None or y is None or x.bits.shape != y.bits.shape:
                continue
            found = numbers(x, y)
            if not found.differing:
                continue
            least = ROUNDING.get(x.dtype, 0.0)
            expected = self.estimate.of(before, x) if before in self.a.records else Distance(least, least)
            excess = math.inf if found.nan else max(found.relative / expected.overall, found.peak / expected.peak)
            why = f"recomputation in {side} gives other values than the forward pass did" if excess > 1 else ""
            return Row(key, x.dtype, x.bits.shape, found, expected, excess, "suspect" if why else "rounding", why)
        return None


def _same_mask(side: str, mask: Logical) -> str:
    """Ranks that drop the same elements of different shards; data-parallel ranks may."""
    seen: dict[tuple[object, bytes], tuple[int, tuple[slice, ...]]] = {}
    for rank, box in mask.ranks:
        dropped = mask.bits[box]
        sample = repr(box[mask.batch]) if mask.batch is not None else ""
        first, place = seen.setdefault((sample, dropped.tobytes()), (rank, box))
        if place != box and 0 < dropped.sum() < dropped.size:
            return f"in {side}, ranks {first} and {rank} drop the same elements of different shards: equal seeds"
    return ""


def _allowed(found: Numbers, seeds: int) -> float:
    """How many times the estimate a tensor may be off."""
    return SAFETY * (1 + FEW / math.sqrt(found.size * max(seeds, 1)))


def _excess(found: Numbers, expected: Distance | None, seeds: int) -> tuple[float, str]:
    """The distance over what is allowed, and what is said if it is the coherent one alone that is above."""
    if found.nan or math.isinf(found.max_abs):  # infinities are left out of the distances
        return math.inf, ""
    if expected is None:
        return 0.0, ""
    allowed = _allowed(found, seeds)
    apart = max(found.relative / (allowed * expected.overall), found.peak / (PEAK_SAFETY * allowed * expected.peak))
    coherent = found.coherent_scale / (COHERENT_SAFETY * allowed * expected.coherent)
    said = f"coherent scale {found.scale:.6g}, where rounding explains 1 ± {expected.coherent:.1g}"
    return max(apart, coherent), said if apart <= 1 < coherent else ""


def _name(key: Key) -> str:
    return f"step {key.step} {key.kind} {key.name}"

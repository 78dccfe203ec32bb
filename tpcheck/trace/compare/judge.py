"""Identical, rounding or suspect: every tensor of B against the same one of A and what rounding may do to it.

    A ──► distance of B from A ──► above SAFETY × the estimate?  ──► suspect
    nudged runs of A ──► estimate ──────┘          or replicas unequal, or recomputed otherwise,
                                                   or a weight that is not its main parameter, rounded

Where most of what was drawn at random starts otherwise in B, the runs are not of one function: nothing after it is
judged, but for what a trace shows by itself. So with losses and gradients if vocabularies are padded differently.

What is exact by nature comes first, before any tensor of a step (`exact.py`); then distances (`excess.py`); at the end
what only many layers and steps show together (`layers.py`).

The first suspect is the first in the order in which a step computes: forward, backward, gradients, optimizer.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tpcheck.errors import shown
from tpcheck.trace.compare.comparison import Comparison, Row, Verdict
from tpcheck.trace.compare.diagnose import adds_up, explain, others, resumed_otherwise
from tpcheck.trace.compare.estimate import GRADIENT_NORM, ROUNDING, Estimate
from tpcheck.trace.compare.exact import exact_findings
from tpcheck.trace.compare.excess import allowed, excess, rounded_too_much
from tpcheck.trace.compare.layers import together
from tpcheck.trace.compare.logical import Key, Logical, encoded
from tpcheck.trace.compare.masks import dropped_apart, rates_apart, same_mask
from tpcheck.trace.compare.metrics import Distance, Numbers, distance, numbers
from tpcheck.trace.compare.pairing import aliases, permutation
from tpcheck.trace.compare.reader import Trace
from tpcheck.trace.compare.shapes import put_straight
from tpcheck.trace.record.noise import REDRAWN

__all__ = ["judge"]

BEFORE_SOFTMAX = ("start", "resumed", "input", "in", "out", "mask", "again")  # of a step; the model's output is losses
DROPPED = (
    "dropout drops other elements in B than in A, as it may where the layouts are two: everything is judged by runs of "
    "A that drop others, too, so that only errors above dropout's own noise are seen; trace with dropout 0 to see more"
)
SAMPLED = (
    "what LayerNorm's gradients miss in bfloat16, by a kernel that adds in it, can't be worked out of a part of the "
    "tokens: trace with sample=1 to have them judged"
)
SHOWN = 8
PADDING_SAFETY = 8.0  # times the share of the vocabulary that one side has more
PARAMETERS = ("grad", "weight", "state")


def judge(a: Trace, b: Trace, estimate: Estimate, vocabulary: tuple[int, int] | None = None) -> Comparison:
    """Compare all that both traces have of the steps both have; `vocabulary` as in `Comparison`."""
    return _Judge(a, b, estimate, vocabulary).compare()


class _Judge:
    """Goes through the tensors in order; remembers what the ones before have shown."""

    def __init__(self, a: Trace, b: Trace, estimate: Estimate, vocabulary: tuple[int, int] | None) -> None:
        self.a, self.b, self.estimate = a, b, estimate
        self.result = Comparison(a, b, vocabulary, seeds=len(estimate.noise))
        self.redrawn = False  # B drops other elements than A, or starts from other weights: nothing after can agree
        self.started = self.softmaxed = False  # past the initial weights; past a softmax over another vocabulary
        self.shapes = dict(put_straight(a, b, list(estimate.noise)))
        self.aliases = dict(aliases(a, b))  # by A's name of it: what a resumed trace begins with, and the other's end
        step = min(set(a.steps) & set(b.steps), default=0)
        alike = [(one.layout, one.microbatches(step), any(key.kind == "again" for key in one.order)) for one in (a, b)]
        self.layouts_are_one = alike[0] == alike[1]
        self.begun: set[int] = set()  # steps
        self.untold: int | None = None  # the step since which a gradient is off by something that cannot be told

    def compare(self) -> Comparison:
        steps = set(self.a.steps) & set(self.b.steps)
        if set(self.a.steps) != set(self.b.steps):
            self.result.notes.append(
                f"A has steps {shown(self.a.steps)}, B has {shown(self.b.steps)}: compared where both have them"
            )
        for step in sorted(steps):
            self._order_samples(step)
        # What only B has, recomputation mostly, comes where B meets it.
        orders = {**self.b.order, **self.a.order}
        for key in sorted(orders, key=lambda key: (orders[key], key)):
            if key.step not in steps:
                continue
            if key.step not in self.begun:
                self._begin(key.step)
            if key.kind not in ("start", "resumed") and not self.started:
                self._start()
            self.softmaxed |= self.result.vocabulary is not None and (
                key.kind not in BEFORE_SOFTMAX or key.name == "model"
            )
            row = self._recomputed(key) if key.kind == "again" else self._row(key)
            self.result.rows += [row] if row else []
        if not self.started:
            self._start()
        if not self.redrawn and not self.softmaxed:
            # What follows from a suspect is off for it; before it, all steps and layers may tell more.
            rows = self.result.rows
            ends = [self.result.first, *(row for row in rows if row.verdict == "unknown" and row.estimate)]
            place = min((rows.index(row) for row in ends if row), default=len(rows))
            parts = not self._noise_is_redrawn
            self.result.rows = [*together(rows[:place], self.estimate, parts), *rows[place:]]
        return self.result

    def _begin(self, step: int) -> None:
        """What is exact by nature, before any tensor of the step."""
        self.begun.add(step)
        for name, words in self.shapes.items() if len(self.begun) == 1 else ():
            self.result.rows.append(_setting(Key(step, "settings", f"sharded {name}"), words, 1.0))
        for found in exact_findings(self.a, self.b, step):
            self.result.rows.append(_setting(Key(step, "settings", found.name), found.why, found.apart))

    def _order_samples(self, step: int) -> None:
        """Where B has A's samples in another order, read them in A's."""
        keys = [key for key in self.a.records if key.step == step and key.kind == "input" and key in self.b.records]
        for key in keys:
            order = permutation(self.a.logical(key), self.b.logical(key))
            if order:
                self.b.orders[step] = order
                those = ", ".join(map(str, order[:SHOWN])) + (" …" if len(order) > SHOWN else "")
                self.result.notes.append(
                    f"step {step}: the global batch's samples are laid over microbatches and ranks in another order in "
                    f"B: A's are there as {those}; compared sample by sample"
                )
                return

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
        if pair is None or isinstance(pair, Row):
            return pair
        name, x, y = pair
        other_dtype = f"{y.dtype} where A has {x.dtype}" if x.dtype != y.dtype and key.kind != "mask" else ""
        if other_dtype:
            x, y = x.widened(), y.widened()
        addends = self.b.dp * self.b.microbatches(key.step)
        fits = rounded_too_much(key, x, y, addends)
        wrong = "; ".join(filter(None, (self._unequal(key, x, y), self._not_copied(key), other_dtype, fits)))
        apart = distance(x, y)
        found = numbers(x, y, apart)

        def row(verdict: Verdict, why: str = "", expected: Distance | None = None, excess: float = 0.0) -> Row:
            return Row(name, x.dtype, x.bits.shape, found, expected, excess, verdict, why, bool(wrong), apart)

        if key.kind == "mask":
            return row(*self._mask(key, x, y, wrong))
        if not found.differing and not wrong:
            return row("identical")
        if not x.floats:
            return row("suspect", wrong or others(key, x, y, self.a), excess=math.inf)
        if self.redrawn:
            return row("suspect" if wrong else "unknown", wrong)
        # What a run starts from has not been computed, so that no nudged run is needed to tell.
        of = self.aliases[key][1] if key in self.aliases else key
        expected = self.estimate.of(of, x) if self.estimate or key.kind == "start" else None
        over = excess(of, found, apart, expected, len(self.estimate.noise), parts=not self._noise_is_redrawn)
        if name.kind.startswith("resumed") and self.layouts_are_one and (over.value > 1 or wrong):
            return row("suspect", wrong if wrong and not fits else resumed_otherwise(name, x, y), expected, math.inf)
        if over.value <= 1 and not wrong:
            if key.kind == "clip":
                self.estimate.clips_apart(key, found.relative)
            return row("rounding" if expected else "unknown", "", expected, over.value)
        if not wrong and (self.estimate.untold(of) or self._follows_what_is_untold(key)):
            if self.untold is None:
                self.untold = key.step
                self.result.notes.append(SAMPLED)
            return row("unknown", "", expected, over.value)
        if self.softmaxed and not wrong and not self._beyond_padding(key, apart):
            return row("other vocabulary", "", expected, over.value)
        why = over.why
        if over.value > 1 and self.result.first is None:
            near = allowed(found.size, len(self.estimate.noise)) * expected.overall if expected else 0.0
            why = "; ".join(filter(None, (over.why, explain(key, x, y, self.a, self.b, found, near))))
        return row("suspect", "; ".join(filter(None, (wrong, why))), expected, over.value)

    def _beyond_padding(self, key: Key, apart: Distance) -> bool:
        """Whether a loss or gradient of the first step is farther off than the share of the padded logits explains.

        What follows from them in later steps, and an optimizer's state, may be off by any share.
        """
        a, b = self.result.vocabulary or (1, 1)
        explained = PADDING_SAFETY * abs(a - b) / min(a, b)
        judged = key.kind in ("out", "loss", "dout", "din", "grad") and key.step == min(self.begun)
        return judged and apart.overall > explained

    def _follows_what_is_untold(self, key: Key) -> bool:
        return self.untold is not None and (key.step > self.untold or key.kind != "grad")

    @property
    def _noise_is_redrawn(self) -> bool:
        """Whether nudged runs drop other elements, too, and say what that does."""
        return bool(self.estimate.noise) and all(trace.perturb >= REDRAWN for trace in self.estimate.noise)

    def _mask(self, key: Key, x: Logical, y: Logical, wrong: str) -> tuple[Verdict, str]:
        """What dropout drops; an element that was zero before it says nothing."""
        differing = dropped_apart(x, y)
        judged = self._noise_is_redrawn
        self.redrawn |= differing and not judged
        wrong = wrong or rates_apart(x, y)
        wrong = wrong or same_mask("A", x) or same_mask("B", y)
        if differing and not wrong and self.layouts_are_one:
            generators = [one[0].get(key.step, {}).get("generators") for one in (self.a.settings, self.b.settings)]
            known = all(generators) and generators[0] != generators[1]
            wrong = "other elements are dropped at the same layout" + (
                "; the random generators are in other states where the step begins: look at what seeds them, and at "
                "what a resume restores" if known else "")  # fmt: skip
        if differing and judged and DROPPED not in self.result.notes:
            self.result.notes.append(DROPPED)
        otherwise: Verdict = "rounding" if judged else "unknown"
        return ("suspect" if wrong else otherwise if differing else "identical"), wrong

    def _pair(self, key: Key) -> tuple[Key, Logical, Logical] | Row | None:
        """Both sides of `key`, and under which name; notes why it cannot be compared, if so."""
        notes = self.result.unmapped
        if key in self.aliases:
            name, here, there = self.aliases[key]
            x, y = self.a.logical(here), self.b.logical(there)
        elif key not in self.a.records or key not in self.b.records:
            if key.kind in ("start", "resumed"):
                return None  # one side has gone on from a step before
            return self._only_in("A" if key in self.a.records else "B", key)
        else:
            name, x, y = key, self.a.logical(key), self.b.logical(key)
        for side, tensor in (("A", x), ("B", y)):
            if isinstance(tensor, str):
                notes.append(f"{_name(key)} in {side}: {tensor}")
        if isinstance(x, str) or isinstance(y, str):
            return None
        if x.bits.shape != y.bits.shape:
            shapes = f"{list(x.bits.shape)} in A, {list(y.bits.shape)} in B"
            if key.kind.partition(".")[0] in ("start", *PARAMETERS) or (key.kind, key.name) == ("out", "model"):
                return _setting(key, f"of another shape: {shapes}", 1.0)
            notes.append(f"{_name(key)}: {shapes}")
            return None
        return name, x, y

    def _only_in(self, side: str, key: Key) -> Row | None:
        """A parameter's gradient or state that one run has alone is a finding; a module's output may be a matter of
        how modules are made up."""
        trace, other = (self.a, self.b) if side == "A" else (self.b, self.a)
        kind = key.kind.partition(".")[0]
        parameter = next((one for one in trace.order if one.kind in ("start", "weight") and one.name == key.name), None)
        known = parameter is not None and any(
            one.name == key.name for one in other.order if one.kind in ("start", "weight")
        )
        likewise = any(one.kind == key.kind and one.step == key.step for one in other.order)
        if kind in PARAMETERS and known and likewise:
            what = {"grad": "no gradient", "weight": "no weight after the update"}.get(kind, "no such optimizer state")
            return _setting(
                key, f"only in {side}: {what} of this parameter in the other run, which has it of others", 1.0
            )
        if kind != "update":
            self.result.unmapped.append(f"{_name(key)} is only in {side}")
        return None

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
        if key.kind.partition(".")[0] in ("start", "resumed", "weight", "input", "mask", "state"):
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
            apart = distance(x, y)
            found = numbers(x, y, apart)
            if not found.differing:
                continue
            least = ROUNDING.get(x.dtype, 0.0)
            expected = self.estimate.of(before, x) if before in self.a.records else Distance(least, least)
            excess = math.inf if found.nan else max(found.relative / expected.overall, found.peak / expected.peak)
            why = f"recomputation in {side} gives other values than the forward pass did" if excess > 1 else ""
            verdict: Verdict = "suspect" if why else "rounding"
            return Row(key, x.dtype, x.bits.shape, found, expected, excess, verdict, why, apart=apart)
        return None


def _setting(key: Key, why: str, apart: float) -> Row:
    """A finding about something that is no tensor, or none that can be held against the other side's."""
    nothing = Numbers(1, 1, 0, apart, apart, apart, (0.0,) * 4, apart, apart, 0.0, 0.0, 0.0, 0.0, 0.0, None)
    return Row(key, "setting", (), nothing, None, math.inf, "suspect", why, True)


def _name(key: Key) -> str:
    return f"step {key.step} {key.kind} {key.name}"

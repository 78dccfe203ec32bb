"""What rounding alone may do to each tensor: the reference, run again with everything it computes nudged.

    A/noise-1, A/noise-2, A/noise-3      traces of the same run with perturb=1, 2, 3, in A's own folder

A tensor's estimate is the largest distance of these from A. Of the coherent distance, which all three may happen to
have little of, it is the root mean square over all nudged runs, layers and steps that a tensor of its role is in, and
at least what independent roundings leave. The gradient norm is one float32 sum over everything, which misses 1e-5 of a
million elements on a CPU: nudged runs clip otherwise by as much as it misses of their own gradients. Where B's
coefficient is off by no more than rounding, its optimizer's state and updates may be off by that, too, and all that
follows by as much more than in the nudged runs as B's coefficient is off by more than theirs.

What a norm's gradient misses is no rounding of single numbers: torch's own kernel adds bfloat16 on a CPU, and is
percents off where the batch is long. It is measured by adding up what is recorded of the norm's output and of its
gradient. Where A is a run of `tpcheck train`, missing ones are made here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tpcheck.checkpoint.tiling import Array
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.files.names import TRACE
from tpcheck.trace.compare.logical import Key, Logical
from tpcheck.trace.compare.metrics import Blocks, Distance, distance
from tpcheck.trace.compare.reader import Trace
from tpcheck.trace.compare.sign_flips import sign_flip_distance
from tpcheck.trace.module_names import role_of
from tpcheck.trace.record.noise import REDRAWN, nudged_folders

__all__ = ["GRADIENT_NORM", "ROUNDING", "Estimate", "open_noise", "open_trace", "spread_of"]

# Half a unit in the last place, relative: what storing a number in the dtype costs, whatever was computed.
ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-24, "float64": 2.0**-53}
GRADIENT_NORM = 64 * ROUNDING["float32"]
# Of a gradient, what is made of it; the weights themselves are moved by far less than they are large.
POWERS = {"grad": 1, "state.exp_avg": 1, "state.exp_avg_sq": 2, "update": 1, "state.main": 0, "weight": 0}
LOSS = 4 * ROUNDING["float32"]  # a mean of many float32, taken in another order
# Student's t that one in a thousand exceeds, against that of three values, with which the limits were found.
FEW_VALUES = {1: 49.3, 2: 2.45}


class Estimate:
    """The effect of rounding on every tensor of `reference`."""

    def __init__(self, reference: Trace, noise: Sequence[Trace]) -> None:
        self.reference, self.noise = reference, noise
        self.known: dict[Key, Distance] = {}
        self.nudged: dict[Key, list[Distance]] = {}
        self.roles: dict[tuple[str, str], list[Key]] = {}
        self.common: dict[tuple[str, str], float] = {}
        for key in reference.order:
            self.roles.setdefault((key.kind, role_of(key.name)), []).append(key)
        self.systematic: set[Key] = set()  # tensors that a kernel misses in one direction, in every layer
        self.parted: dict[tuple[str, str], list[float]] = {}
        self.clipped = GRADIENT_NORM
        self.more, self.since = 1.0, 0  # how much more B clips apart than nudged runs do, from which step on

    def clips_apart(self, key: Key, by: float) -> None:
        """B has been clipped otherwise than A, relative `by`, as rounding may: so is all that follows from it."""
        self.clipped = max(self.clipped, by)
        theirs = max((one.overall for one in self.nudged.get(key, [])), default=0.0)
        if by > theirs > 0 and by / theirs > self.more:
            self.more, self.since = by / theirs, min(self.since or key.step + 1, key.step + 1)

    def __bool__(self) -> bool:
        return bool(self.noise)

    def of(self, key: Key, a: Logical) -> Distance:
        """How far rounding may take `a`, which is the reference's `key`."""
        if key not in self.known:
            found = [*self.runs(key, a), self._least(key, a)]
            if key.kind in ("weight", "state.main", "update"):
                found.append(self._turned(key, a))
            kernel = list(self._kernel(key))
            self.systematic |= {key} if kernel else set()
            found += kernel
            overall = max(one.overall for one in found)
            # A factor of norms cannot be told where one side may have more rounding in it than the other.
            coherent = max(overall / max(a.bits.size, 1) ** 0.5, overall**2 / 2, self._coherent(key),
                           *(one.coherent for one in found[len(self.runs(key, a)) :]))  # fmt: skip
            peak, median = (max(getattr(one, name) for one in found) for name in ("peak", "median"))
            self.known[key] = Distance(overall, peak, coherent, median, 0.0, tuple(self._parts(key)))
        more = self.more if self.more > 1 and key.step >= self.since else 1.0
        return _times(self.known[key], more) if more > 1 else self.known[key]

    def untold(self, key: Key) -> bool:
        """Whether `key` follows from a LayerNorm's gradient in bfloat16, and tokens are missing to tell what it should
        be."""
        if self.reference.sample == 1 or self.reference.dtype != "bfloat16" or not _of_a_norm(key):
            return False
        bias = f"{key.name.rpartition('.')[0]}.bias"
        return any((kind, name) == ("start", bias) for _, kind, name in self.reference.order)

    def runs(self, key: Key, a: Logical | None = None) -> list[Distance]:
        """How far each nudged run is from the reference."""
        if key not in self.nudged:
            a = a or self.reference.logical_or_none(key)
            others = [trace.logical_or_none(key) for trace in self.noise] if a is not None else []
            self.nudged[key] = [
                distance(a, other)  # type: ignore[arg-type]
                for other in others
                if other is not None and other.bits.shape == a.bits.shape  # type: ignore[union-attr]
            ]
        return self.nudged[key]

    def _coherent(self, key: Key) -> float:
        """The spread of a common factor, over all that has the role of `key`; its own runs' if that is more."""
        role = key.kind, role_of(key.name)
        if role not in self.common:
            every = [one.coherent for other in self.roles.get(role, []) for one in self.runs(other)]
            self.common[role] = spread_of(every)
        return max(self.common[role], _root_mean_square([one.coherent for one in self.runs(key)]))

    def _parts(self, key: Key) -> Iterator[Blocks]:
        """Part by part the most that nudged runs are off by, and how far a common factor of a part alone spreads."""
        runs, role = self.runs(key), (key.kind, role_of(key.name))
        if role not in self.parted:
            every = [run.blocks for other in self.roles.get(role, []) for run in self.runs(other)]
            levels = max(map(len, every), default=0)
            self.parted[role] = [
                _inflation([one[level] for one in every if len(one) > level]) for level in range(levels)
            ]
        for level, held in enumerate(zip(*(one.blocks for one in runs), strict=True)):
            error = np.max([one.error for one in held], axis=0)
            independent = _independent(replace(held[0], error=error))
            more = self.parted[role][level] if level < len(self.parted[role]) else _inflation(held)
            yield replace(held[0], error=error, scale=max(1.0, more) * independent)

    def _least(self, key: Key, a: Logical) -> Distance:
        least, itself = ROUNDING.get(a.dtype, 0.0), _of_all(a)
        if key.kind == "update":
            # The difference of two float32 numbers, each of which is rounded.
            after = self.reference.logical_or_none(self.reference.updates[key][1])
            if after is None:
                return Distance(0.0, 0.0)
            rounding = ROUNDING["float32"]
            whole = distance(replace(a, bits=after.values().view("<u8")), replace(a, bits=np.zeros_like(a.bits)))
            moved, kept = (float(np.linalg.norm(one.values())) for one in (a, after))
            relative = rounding * kept / moved if moved else 0.0
            return Distance(relative, relative * max(whole.peak, 1.0), relative, rounding * _of_all(after).median)
        if key.kind == "loss":
            least = LOSS
        if key.kind == "clip" or key.kind.startswith("state"):
            # The gradient norm, by which all are scaled, is a float32 sum over everything, in an order of its own.
            apart = GRADIENT_NORM if key.kind == "clip" else self.clipped
            scaled = apart * (2 if key.kind.endswith("_sq") else 1)
            peak = max(least, scaled * itself.peak)
            return Distance(max(least, scaled), peak, scaled, max(least, scaled) * itself.median)
        return Distance(least, least, 0.0, least * itself.median)

    def _kernel(self, key: Key) -> Iterator[Distance]:
        """What a norm's gradients, and what follows from them, are off by from the sums that they should be."""
        if not _of_a_norm(key):
            return
        power, (module, _, which) = POWERS[key.kind], key.name.rpartition(".")
        for step in {key.step} if key.kind == "grad" else {one for one in self.reference.steps if one <= key.step}:
            due = self._norm_gradient(step, module, which)
            a = self.reference.logical_or_none(Key(step, "grad", key.name))
            if due is None or a is None or a.values().shape != due.shape:
                continue
            x, square = a.values(), float((due * due).sum())
            times = float((x * due).sum()) / square if square else 0.0
            if not 0.5 < times < 2:  # all gradients are divided by something, such as a number of tokens
                due = due * times
            if float(np.linalg.norm(x - due)) < float(np.linalg.norm(x)) / 2:
                found = distance(replace(a, dtype="float64", bits=x.view("<u8")),
                                 replace(a, dtype="float64", bits=due.view("<u8")))  # fmt: skip
                # That of the gradient, and not of what is made of it, whose elements are of another size.
                median = found.median if key.kind == "grad" else math.inf
                yield replace(_times(found, power), median=median, blocks=())

    def _norm_gradient(self, step: int, module: str, which: str) -> Array | None:
        """Σ dy of a norm's bias, Σ dy·(y - bias)/weight of its weight, over all tokens."""
        held = {kind: self.reference.logical_or_none(Key(step, kind, module)) for kind in ("out", "dout")}
        y, dy = (one.values() if one is not None else None for one in held.values())
        if dy is None or which == "bias":
            return None if dy is None else np.asarray(dy.reshape(-1, dy.shape[-1]).sum(0))
        gamma, beta = (self._parameter(step, f"{module}.{name}") for name in ("weight", "bias"))
        if y is None or gamma is None or not gamma.all() or gamma.shape != y.shape[-1:]:
            return None
        normed = (y - (0.0 if beta is None else beta)) / gamma
        return np.asarray((dy * normed).reshape(-1, dy.shape[-1]).sum(0))

    def _parameter(self, step: int, name: str) -> Array | None:
        """What a step begins with."""
        for key in (Key(step - 1, "weight", name), Key(step, "start", name)):
            if (found := self.reference.logical_or_none(key)) is not None:
                return found.values()
        return None

    def _turned(self, key: Key, a: Logical) -> Distance:
        """What nudged runs too few to show it may do to an updated weight."""
        records = self.reference.records
        kind = "state.main" if key.kind == "update" and key._replace(kind="state.main") in records else key.kind
        kind = "weight" if kind == "update" else kind
        before = [Key(key.step - 1, kind, key.name), Key(key.step, "resumed.main", key.name),
                  Key(key.step, "start", key.name)]  # fmt: skip
        deciding = [Key(key.step, "state.exp_avg", key.name), Key(key.step, "grad", key.name)]
        earlier, average = (next((one for one in ones if one in records), None) for ones in (before, deciding))
        after = self.reference.logical_or_none(key._replace(kind=kind))
        if earlier is None or average is None or after is None:
            return Distance(0.0, 0.0)
        w, m = self.reference.logical_or_none(earlier), self.reference.logical_or_none(average)
        if w is None or m is None or not after.bits.shape == w.bits.shape == m.bits.shape:
            return Distance(0.0, 0.0)
        of = a if key.kind == "update" else after
        turned = sign_flip_distance(w.values(), after.values(), m.values(), self.of(average, m).overall, of.values())
        if key.kind == "update":
            return replace(turned, overall=max(turned.overall, self.clipped), peak=max(turned.peak, self.clipped))
        # What the model starts from is the same; roundings of it are those of another dtype than a main parameter's.
        past = Distance(0.0, 0.0) if earlier.kind == "start" else self.of(earlier, w)
        # An update is at most in proportion to the gradients, so that another clip coefficient scales it no more.
        update = distance(w, after)
        scaled = Distance(self.clipped * update.overall, self.clipped * update.peak)
        every = (turned, past, scaled)
        return Distance(max(one.overall for one in every), max(one.peak for one in every))


def _of_a_norm(key: Key) -> bool:
    """Whether this is the gradient of a norm's parameter, or made of it."""
    module, _, which = key.name.rpartition(".")
    return key.kind in POWERS and "norm" in module.rpartition(".")[2] and which in ("weight", "bias")


def _independent(part: Blocks) -> Array:
    """How far independent roundings would spread the common factor of each part."""
    relative = np.sqrt(np.divide(part.error, part.square, out=np.zeros_like(part.error), where=part.square > 0))
    return np.asarray(relative / part.size**0.5)


def _inflation(held: Sequence[Blocks]) -> float:
    """How much farther nudged runs spread it."""
    ratios = []
    for part in held:
        independent = _independent(part)
        ratios.append(part.scale[independent > 0] / independent[independent > 0])
    every = np.concatenate(ratios) if ratios else np.zeros(0)
    # The parts of one tensor are measured from their mean: one of them is known from the others.
    return spread_of(every, every.size - len(held)) if every.size else 1.0


def _times(one: Distance, more: float) -> Distance:
    blocks = tuple(replace(part, error=part.error * more**2, scale=part.scale * more) for part in one.blocks)
    return Distance(one.overall * more, one.peak * more, one.coherent * more, one.median * more, 0.0, blocks)


def spread_of(values: Sequence[float] | Array, free: int | None = None) -> float:
    """The standard deviation that `values` around zero are from, as large as so few, `free` of each other, leave it
    possible."""
    return FEW_VALUES.get(len(values) if free is None else free, 1.0) * _root_mean_square(values)


def _root_mean_square(values: Sequence[float] | Array) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else 0.0


def open_trace(path: Path) -> Trace:
    """The trace in a result directory, or the one that `path` itself is."""
    if not path.is_dir():
        raise TpcheckError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a run or a trace")
    if result_dir.is_result(path) and not (path / TRACE).is_dir():
        raise TpcheckError(f"{path} has no trace: train it again with trace.steps=[0,1]")
    return Trace(path / TRACE if (path / TRACE).is_dir() else path)


def open_noise(path: Path, reference: Trace, redrawn: bool = False) -> list[Trace]:
    """The traces of the reference at `path` run again, nudged: its folders `noise-1`, `noise-2` …; those that drop
    other elements, where B does, if there are any."""
    traces = [_open_nudged(folder, path) for folder in nudged_folders(path)]
    traces = [trace for trace in traces if (trace.perturb >= REDRAWN) == redrawn]
    seen: set[int] = set()
    for trace in traces:
        if trace.steps != reference.steps or trace.dtype != reference.dtype or trace.sample != reference.sample:
            raise TpcheckError(f"{trace.path} is not the reference run again: its steps, dtype or sampling are others")
        if (key := _other_input(trace, reference)) is not None:
            raise TpcheckError(
                f"{trace.path} is not the reference run again: {key.name} of step {key.step} is another: "
                f"remove it, and make it anew with the data that {path} had"
            )
        if not trace.perturb or trace.perturb in seen:
            raise TpcheckError(
                f"{trace.path} says nothing of rounding: it is traced with perturb={trace.perturb}, "
                f"{'as another is' if trace.perturb else 'which nudges nothing'}: use perturb=1, 2, 3"
            )
        seen.add(trace.perturb)
    return traces


def _other_input(trace: Trace, reference: Trace) -> Key | None:
    """What a nudged run was given and the reference was not: what follows from it is no rounding."""
    for key in reference.records:
        if key.kind == "input":
            x, y = reference.logical_or_none(key), trace.logical_or_none(key)
            if x is not None and y is not None and not x.floats and not np.array_equal(x.bits, y.bits):
                return key
    return None


def _open_nudged(folder: Path, path: Path) -> Trace:
    try:
        return open_trace(folder)
    except TpcheckError as error:
        if not result_dir.is_result(path):
            raise
        raise TpcheckError(
            f"{folder}, a nudged run, is not whole: remove it, and it is made again ({error})"
        ) from error


def _of_all(a: Logical) -> Distance:
    """How far a tensor is from nothing: its largest row, the median of its absolute values."""
    return distance(a, replace(a, bits=np.zeros_like(a.bits)))

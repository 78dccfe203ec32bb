"""What rounding alone may do to each tensor: the reference, run again with everything it computes nudged.

    A/noise-1, A/noise-2, A/noise-3      traces of the same run with perturb=1, 2, 3, in A's own folder

A tensor's estimate is the largest distance of these from A; of the coherent distance, which all three may happen to
have little of, at least what independent roundings leave. The gradient norm is one float32 sum over everything, which
misses 1e-5 of a million elements on a CPU: nudged runs clip otherwise by as much as it misses of their own gradients,
and where B's coefficient is off by no more than rounding, its optimizer's state and updates may be off by that, too.
Where A is a run of `tpcheck train`, missing ones are made here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.files.names import TRACE
from tpcheck.trace.compare.metrics import Distance, distance
from tpcheck.trace.compare.reader import Key, Logical, Trace
from tpcheck.trace.compare.sign_flips import sign_flip_distance

__all__ = ["GRADIENT_NORM", "ROUNDING", "Estimate", "open_noise", "open_trace"]

# Half a unit in the last place, relative: what storing a number in the dtype costs, whatever was computed.
ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-24, "float64": 2.0**-53}
GRADIENT_NORM = 64 * ROUNDING["float32"]


class Estimate:
    """The effect of rounding on every tensor of `reference`."""

    def __init__(self, reference: Trace, noise: Sequence[Trace]) -> None:
        self.reference, self.noise = reference, noise
        self.known: dict[Key, Distance] = {}
        self.clipped = GRADIENT_NORM

    def clips_apart(self, by: float) -> None:
        """B has been clipped otherwise than A, relative `by`, as rounding may: so is all that follows from it."""
        self.clipped = max(self.clipped, by)

    def __bool__(self) -> bool:
        return bool(self.noise)

    def of(self, key: Key, a: Logical) -> Distance:
        """How far rounding may take `a`, which is the reference's `key`."""
        if key not in self.known:
            found = [*self._nudged(key, a), self._least(key, a)]
            if key.kind in ("weight", "state.main"):
                found.append(self._turned(key, a))
            overall = max(one.overall for one in found)
            # Roundings of A itself, which are in <a,a> and not in <a,b>, bring s below 1 by up to their square.
            coherent = max(overall / max(a.bits.size, 1) ** 0.5, overall**2, *(one.coherent for one in found))
            self.known[key] = Distance(overall, max(one.peak for one in found), coherent)
        return self.known[key]

    def _nudged(self, key: Key, a: Logical) -> Iterator[Distance]:
        for trace in self.noise:
            other = trace.logical_or_none(key)
            if other is not None and other.bits.shape == a.bits.shape:
                yield distance(a, other)

    def _least(self, key: Key, a: Logical) -> Distance:
        least = ROUNDING.get(a.dtype, 0.0)
        if key.kind == "clip" or key.kind.startswith("state"):
            # The gradient norm, by which all are scaled, is a float32 sum over everything, in an order of its own.
            apart = GRADIENT_NORM if key.kind == "clip" else self.clipped
            scaled = apart * (2 if key.kind.endswith("_sq") else 1)
            all_of_it = distance(a, replace(a, bits=np.zeros_like(a.bits)))
            return Distance(max(least, scaled), max(least, scaled * all_of_it.peak), scaled)
        return Distance(least, least)

    def _turned(self, key: Key, a: Logical) -> Distance:
        """What nudged runs too few to show it may do to an updated weight."""
        records = self.reference.records
        before = [Key(key.step - 1, key.kind, key.name), Key(key.step, "start", key.name)]
        deciding = [Key(key.step, "state.exp_avg", key.name), Key(key.step, "grad", key.name)]
        earlier, average = (next((one for one in ones if one in records), None) for ones in (before, deciding))
        if earlier is None or average is None:
            return Distance(0.0, 0.0)
        w, m = self.reference.logical_or_none(earlier), self.reference.logical_or_none(average)
        if w is None or m is None or not a.bits.shape == w.bits.shape == m.bits.shape:
            return Distance(0.0, 0.0)
        now, past = (
            sign_flip_distance(w.values(), a.values(), m.values(), self.of(average, m).overall),
            self.of(earlier, w),
        )
        # An update is at most in proportion to the gradients, so that another clip coefficient scales it no more.
        update = distance(w, a)
        scaled = Distance(*(self.clipped * one for one in (update.overall, update.peak)))
        every = (now, past, scaled)
        return Distance(max(one.overall for one in every), max(one.peak for one in every))


def open_trace(path: Path) -> Trace:
    """The trace in a result directory, or the one that `path` itself is."""
    if not path.is_dir():
        raise TpcheckError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a run or a trace")
    if result_dir.is_result(path) and not (path / TRACE).is_dir():
        raise TpcheckError(f"{path} has no trace: train it again with trace.steps=[0,1]")
    return Trace(path / TRACE if (path / TRACE).is_dir() else path)


def open_noise(path: Path, reference: Trace) -> list[Trace]:
    """The traces of the reference at `path` run again, nudged: its folders `noise-1`, `noise-2` …"""
    found = sorted(folder for folder in path.glob("noise-*") if folder.is_dir())
    traces = [_open_nudged(folder, path) for folder in found]
    seen: set[int] = set()
    for trace in traces:
        if trace.steps != reference.steps or trace.dtype != reference.dtype or trace.sample != reference.sample:
            raise TpcheckError(f"{trace.path} is not the reference run again: its steps, dtype or sampling are others")
        if not trace.perturb or trace.perturb in seen:
            raise TpcheckError(
                f"{trace.path} says nothing of rounding: it is traced with perturb={trace.perturb}, "
                f"{'as another is' if trace.perturb else 'which nudges nothing'}: use perturb=1, 2, 3"
            )
        seen.add(trace.perturb)
    return traces


def _open_nudged(folder: Path, path: Path) -> Trace:
    try:
        return open_trace(folder)
    except TpcheckError as error:
        if not result_dir.is_result(path):
            raise
        raise TpcheckError(
            f"{folder}, a nudged run, is not whole: remove it, and it is made again ({error})"
        ) from error

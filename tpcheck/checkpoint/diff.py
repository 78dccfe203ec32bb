"""Where two runs part: the first step whose loss or gradient norm differs, and the tensors that differ in the end.

A side is a result directory or a checkpoint. States are compared at the last step both sides have one of; by
digest, and element by element where the checkpoints are still there. Three answers, as `diff` has them:

    0  identical    every step, and every tensor of the same state
    1  different    some step or some tensor differs
    2  can't tell   nothing differs as far as the two can be compared, but that is not all the way: different
                    models, one run shorter than the other, no state in common

What else checkpoints hold, such as groups of parameters, counters and generator states, is told where it differs, and
decides nothing: much of it follows the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tpcheck.checkpoint.digest import PARTS, Digests, TensorDigest, digest_checkpoint, require_equal
from tpcheck.checkpoint.reader import Checkpoint
from tpcheck.checkpoint.ulp import Difference, compare
from tpcheck.config.differences import settings_differences
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.files.names import DIGESTS

__all__ = ["IDENTICAL", "Report", "StepDifference", "TensorDifference", "diff"]

IDENTICAL, DIFFERENT, CANNOT_TELL = 0, 1, 2
ANSWERS = ("identical", "different", "can't tell")

Digest: TypeAlias = Callable[[Path], Digests]
Json: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class StepDifference:
    """The first step at which a recorded number differs; `values` are both sides' hexadecimal floats by name."""

    step: int
    values: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs; `elements` is None where only its digests are left."""

    part: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: Difference | None


@dataclass
class Report:
    """What the comparison found. `state` is the step of the states compared, None between bare checkpoints."""

    a: Path
    b: Path
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    steps: int = 0
    first: StepDifference | None = None
    state: int | None = None
    compared: dict[str, int] = field(default_factory=dict)
    tensors: list[TensorDifference] = field(default_factory=list)
    recorded: list[str] = field(default_factory=list)  # sides whose digests were not computed anew
    doubts: list[str] = field(default_factory=list)
    beside: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)  # what else differs, in A and B
    incomparable: bool = False

    @property
    def exit_code(self) -> int:
        if not self.incomparable and (self.first or self.tensors):
            return DIFFERENT
        return CANNOT_TELL if self.doubts else IDENTICAL

    @property
    def answer(self) -> str:
        return ANSWERS[self.exit_code]


def diff(a: Path, b: Path, digest: Digest = digest_checkpoint, verify: bool = False) -> Report:
    """Compare two result directories, two checkpoints, or one of each.

    Args:
        digest: how a checkpoint is digested where no digests are on record.
        verify: digest every checkpoint anew; what is on record must be equal.

    Raises:
        TpcheckError: a side can't be read; to verify, its checkpoint has gone, is damaged, or not what is on record.
    """
    left, right = _Side(a, verify), _Side(b, verify)
    report = Report(a, b, config=_config_differences(left.manifest, right.manifest))
    if left.is_result and right.is_result:
        _compare_steps(report, left.steps(), right.steps())
    _compare_states(report, left, right, digest)
    return report


class _Side:
    """A result directory, or a checkpoint by itself as the only state of a run of unknown steps."""

    def __init__(self, path: Path, verify: bool) -> None:
        self.path, self.verify = path, verify
        self.is_result = result_dir.is_result(path) and not (path / ".metadata").exists()
        self.manifest: Json = result_dir.read_manifest(path) if self.is_result else {}
        recorded = result_dir.read_digests(path) if self.is_result else None
        self.recorded = recorded and (recorded["step"], Digests.from_json(recorded, str(path / DIGESTS)))
        self.checkpoints: dict[int | None, Path] = {None: path}
        if self.is_result:
            self.checkpoints = dict(result_dir.checkpoints(path))

    def steps(self) -> dict[int, Json]:
        return {record["step"]: record for record in result_dir.read_steps(self.path)}

    def states(self) -> set[int | None]:
        return {*self.checkpoints, *({self.recorded[0]} if self.recorded else ())}

    def digests(self, state: int | None, digest: Digest) -> Digests:
        on_record = self.recorded[1] if self.recorded and self.recorded[0] == state else None
        if on_record and not self.verify:
            return on_record
        if state not in self.checkpoints:
            raise TpcheckError(f"{self.path} has no checkpoint of step {state} to verify its digests with")
        found = digest(self.checkpoints[state])
        if on_record:
            require_equal(on_record, found, self.checkpoints[state])
        return found


def _config_differences(a: Json, b: Json) -> dict[str, tuple[Any, Any]]:
    """Settings, versions and data that differ, by dotted name; where a run writes to is not one of them."""
    if not a or not b:
        return {}
    one, other = (
        {
            **manifest["config"],
            "versions": manifest.get("versions") or {},
            "code": result_dir.code(manifest),
            "data.digest": (manifest.get("data") or {}).get("digest"),
        }
        for manifest in (a, b)
    )
    return settings_differences(one, other, ignore={"output"})


def _compare_steps(report: Report, a: Mapping[int, Json], b: Mapping[int, Json]) -> None:
    common = sorted(a.keys() & b.keys())
    report.steps = len(common)
    for step in common:
        names = dict.fromkeys(name for name in (*a[step], *b[step]) if name.endswith("_hex"))
        pairs = {name.removesuffix("_hex"): (str(a[step].get(name)), str(b[step].get(name))) for name in names}
        if differing := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
            report.first = StepDifference(step, differing)
            break
    if a.keys() != b.keys():
        extents = [f"steps {min(steps)} to {max(steps)}" if steps else "no steps" for steps in (a, b)]
        report.doubts.append(f"A has {extents[0]}, B has {extents[1]}: compared where both have them")


def _compare_states(report: Report, left: _Side, right: _Side, digest: Digest) -> None:
    for label, side in (("A", left), ("B", right)):
        if side.is_result and not side.recorded:
            report.doubts.append(f"{label} has not come to its end: it has no {DIGESTS}")
    states = _states_to_compare(left, right)
    if states is None:
        report.doubts.append("no state in common: no step has digests or a checkpoint on both sides")
        return
    report.state = states[0] if states[0] == states[1] else None
    a, b = left.digests(states[0], digest), right.digests(states[1], digest)
    sides = (("A", left, states[0]), ("B", right, states[1]))
    report.recorded = [
        label for label, side, state in sides if side.recorded and side.recorded[0] == state and not side.verify
    ]
    differing: list[tuple[str, str, TensorDigest]] = []
    undigested = {label: d.notes for label, d in (("A", a), ("B", b)) if d.optimizer is None and d.notes}
    report.doubts.extend(f"{label}: {note}" for label, notes in undigested.items() for note in notes)
    for part in PARTS:
        if part == "optimizer" and undigested:
            report.compared[part] = 0
            continue
        _check_alike(report, part, a.tensors[part], b.tensors[part])
        alike = [name for name, tensor in a.tensors[part].items() if _kind(tensor) == _kind(b.tensors[part].get(name))]
        report.compared[part] = len(alike)
        for name in alike:
            if a.tensors[part][name] != b.tensors[part][name]:
                differing.append((part, name, a.tensors[part][name]))
    if a.beside and b.beside:
        names = sorted(a.beside.keys() | b.beside.keys())
        pairs = {name: (a.beside.get(name), b.beside.get(name)) for name in names}
        report.beside = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    compare_elements = _elements(left.checkpoints.get(states[0]), right.checkpoints.get(states[1]))
    with ThreadPoolExecutor() as pool:
        elements = pool.map(compare_elements, [name for _, name, _ in differing])
        report.tensors = [
            TensorDifference(part, name, tensor.dtype, tensor.shape, found)
            for (part, name, tensor), found in zip(differing, elements, strict=True)
        ]


def _states_to_compare(left: _Side, right: _Side) -> tuple[int | None, int | None] | None:
    """The last state both have; a bare checkpoint is compared with a run's last state."""
    if left.is_result == right.is_result:
        common = left.states() & right.states()
        last = max(common, key=_or_zero, default=-1)
        return None if last == -1 else (last, last)
    if not left.states() or not right.states():
        return None
    return max(left.states(), key=_or_zero), max(right.states(), key=_or_zero)


def _or_zero(state: int | None) -> int:
    return state or 0


def _kind(tensor: TensorDigest | None) -> tuple[str, tuple[int, ...]] | None:
    return (tensor.dtype, tensor.shape) if tensor else None


def _check_alike(report: Report, part: str, a: Mapping[str, TensorDigest], b: Mapping[str, TensorDigest]) -> None:
    """Note what keeps two models or two optimizers from being compared tensor by tensor."""
    unlike = [name for name in sorted(a.keys() | b.keys()) if _kind(a.get(name)) != _kind(b.get(name))]
    if not unlike:
        return
    name = unlike[0]
    kinds = [f"{tensor.dtype}{list(tensor.shape)}" if tensor else "absent" for tensor in (a.get(name), b.get(name))]
    report.doubts.append(
        f"different {part}s: {len(unlike)} tensors are not the same kind, as {name}: {kinds[0]} in A, {kinds[1]} in B"
    )
    report.incomparable |= part == "model"


def _elements(a: Path | None, b: Path | None) -> Callable[[str], Difference | None]:
    """A function that compares a tensor element by element, and gives None where that is not to be had."""
    if a is None or b is None:
        return lambda name: None
    left, right = Checkpoint(a), Checkpoint(b)

    def compare_tensor(name: str) -> Difference | None:
        x, y = left.tensors.get(name), right.tensors.get(name)
        if x is None or y is None or (x.dtype, x.shape) != (y.dtype, y.shape):
            return None
        return compare(left.blocks(x), right.blocks(y), x.dtype)

    return compare_tensor

"""What is exact by nature, held against each other field by field: no tolerance, and before any tensor.

    ranks' lines ─► one value a field and parameter, or unequal ones: a finding ─► A's against B's ─► Findings

Where all parameters differ in a field, as after a wrong learning rate, that is one finding; so is a part of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tpcheck.errors import TpcheckError
from tpcheck.trace.compare.reader import Trace

__all__ = ["Finding", "exact_findings"]

STORED = 2.0**-23  # relative: a number that one side has kept in float32 is the same number
FIRST = ("group", "requires_grad", "weight_decay", "lr", "steps")
WORDS = {
    "lr": "learning rate", "weight_decay": "weight decay", "eps": "epsilon", "betas": "betas",
    "steps": "count of updates",
    "group": "parameter group", "requires_grad": "whether it is trained", "clip_grad": "clip threshold",
    "sharded": "dimension and stride that it is marked to be cut along",
    "decoupled_weight_decay": "whether weight decay goes past the moments",
    "tokens": "tokens of the global batch, by which gradients are divided",
    "tokens counted": "tokens that ranks have counted",
}  # fmt: skip
ACTIONS = {
    "lr": "compare the schedules' step, warm-up and maximum, and after a resume what the scheduler was loaded with",
    "weight_decay": "look at which parameters the groups with and without decay are made of",
    "group": "look at how parameters are gathered for the optimizer: what is in no group keeps its value",
    "requires_grad": "look for what freezes or filters parameters by name or class",
    "steps": "look at what is restored on resume: bias correction follows this count",
    "tokens": "look at the all-reduce of the token count over data parallelism, and at what the loss mask leaves",
    "tokens counted": "look at the loss mask, and at which rank masks what",
    "clip_grad": "the threshold is another",
}
NAMED = 3
Values = dict[str, dict[str, list[tuple[int, Any]]]]  # by field and by what has it, of every rank that knows


@dataclass(frozen=True)
class Finding:
    """A field that differs: which, of whom, and in words that a user can act on. `apart` is relative, if of numbers."""

    field: str
    of: str
    why: str
    apart: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.field} {self.of}".strip()


def exact_findings(a: Trace, b: Trace, step: int) -> Iterator[Finding]:
    """What differs in the settings that both traces have of `step`; nothing where one has none."""
    sides = [[(rank, lines[step]) for rank, lines in enumerate(t.settings) if step in lines] for t in (a, b)]
    if not all(sides):
        return
    for part in (_run, _modules, _parameters):
        try:
            left, right = (_by_field(part(trace, lines)) for trace, lines in zip((a, b), sides, strict=True))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise TpcheckError(f"the settings of step {step} are damaged ({error!r}): copy the traces again") from error
        order = {field: place for place, field in enumerate(FIRST)}
        for field in sorted(left.keys() & right.keys(), key=lambda field: (order.get(field, len(order)), field)):
            yield from _in_field(field, left[field], right[field], named=part is _modules)


def _run(trace: Trace, lines: list[tuple[int, Any]]) -> Iterator[tuple[str, str, int, Any]]:
    """Field, of what, rank, value."""
    clipping = trace.megatron and any(line["run"] for _, line in lines)
    for rank, line in lines:
        found = {key: value for key, value in line["run"].items() if key not in ("tokens counted", "all groups")}
        if clipping:
            found.setdefault("clip_grad", 0.0)
        for field, value in found.items():
            yield field.removeprefix("config."), "", rank, value
    counted = [
        line["run"]["tokens counted"]
        for rank, line in lines
        if "tokens counted" in line["run"] and not trace.ranks[rank]["tp_rank"]
    ]
    if counted:
        yield "tokens counted", "", 0, sum(counted)


def _modules(trace: Trace, lines: list[tuple[int, Any]]) -> Iterator[tuple[str, str, int, Any]]:
    for rank, line in lines:
        for label, fields in line.get("modules", {}).items():
            for field, value in fields.items():
                yield field, label, rank, value


def _parameters(trace: Trace, lines: list[tuple[int, Any]]) -> Iterator[tuple[str, str, int, Any]]:
    grouped = {name for _, line in lines for name, one in line["parameters"].items() if "group" in one}
    for rank, line in lines:
        for name, one in line["parameters"].items():
            for field in ("requires_grad", "steps"):
                if field in one:
                    yield field, name, rank, one[field]
            if one.get("sharded"):
                yield "stride that it is cut with", name, rank, one["sharded"][1]
            if line["run"].get("all groups"):
                yield "group", name, rank, "in one" if name in grouped else "in none"
            if "group" in one:
                for field, value in line["groups"][one["group"]].items():
                    if field != "optimizer":
                        yield field, name, rank, value


def _by_field(found: Iterator[tuple[str, str, int, Any]]) -> Values:
    values: Values = {}
    for field, of, rank, value in found:
        values.setdefault(field, {}).setdefault(of, []).append((rank, value))
    return values


def _in_field(field: str, a: Mapping[str, Any], b: Mapping[str, Any], named: bool) -> Iterator[Finding]:
    """`named`: of modules, the first is named also where all differ."""
    unequal: dict[str, list[str]] = {}
    other: dict[str, tuple[list[str], float]] = {}
    both = [of for of in a if of in b]
    for of in both:
        for side, held in (("A", a[of]), ("B", b[of])):
            (first, value), *rest = held
            strangers = [(rank, one) for rank, one in rest if not _same(one, value)]
            if strangers:
                rank, one = strangers[0]
                text = f"ranks of {side} disagree: {_shown(one)} on rank {rank}, {_shown(value)} on rank {first}"
                unequal.setdefault(text, []).append(of)
        x, y = a[of][0][1], b[of][0][1]
        if not _same(x, y) and not any(of in names for names in unequal.values()):
            other.setdefault(f"{_shown(y)} in B, {_shown(x)} in A", ([], _apart(x, y)))[0].append(of)
    for text, names in unequal.items():
        yield _finding(field, names, not named and len(both) == len(names), text, 1.0)
    for text, (names, apart) in other.items():
        yield _finding(field, names, not named and len(both) == len(names), text, apart)


def _finding(field: str, names: list[str], whole: bool, text: str, apart: float) -> Finding:
    word, action = WORDS.get(field, field), ACTIONS.get(field, "")
    listed = "" if whole else ", of " + ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more"
                                                                    if len(names) > NAMED else "")  # fmt: skip
    return Finding(field, "" if whole else names[0], f"{word}: {text}{listed}{f'; {action}' if action else ''}", apart)


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, list) and isinstance(y, list):
        return len(x) == len(y) and all(map(_same, x, y))
    if isinstance(x, (int, float)) and isinstance(y, (int, float)):
        return bool(x == y) or abs(x - y) <= STORED * max(abs(x), abs(y))
    return bool(x == y)


def _apart(x: Any, y: Any) -> float:
    if isinstance(x, (int, float)) and isinstance(y, (int, float)) and x:
        return float(abs(y - x) / abs(x))
    return 1.0


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value

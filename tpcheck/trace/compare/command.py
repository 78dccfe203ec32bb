"""`tpcheck compare A B`: is what differs between two traced runs rounding, or a bug, and in which module?

A is the reference. Exit codes: 0 identical, or nothing but rounding and what another padding of the vocabulary may do,
1 not rounding: suspect, or runs of other initial weights, 2 can't tell: it differs, and there is no estimate of what
rounding may do.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tpcheck.errors import TpcheckError
from tpcheck.trace.compare.comparison import Comparison, Row, Verdict
from tpcheck.trace.compare.estimate import Estimate, open_noise, open_trace
from tpcheck.trace.compare.judge import judge
from tpcheck.trace.compare.pairing import drops_otherwise
from tpcheck.trace.compare.reader import Trace
from tpcheck.trace.compare.vocabulary import along_vocabulary, cut_alike, padding

__all__ = ["EXIT_CODES", "command", "compare", "to_json"]

EXIT_CODES: dict[Verdict, int] = {
    "identical": 0, "rounding": 0, "suspect": 1, "other weights": 1, "other vocabulary": 0, "unknown": 2,
}  # fmt: skip


def compare(a: Path, b: Path, nudge: Callable[[Path, bool], None] | None = None) -> Comparison:
    """Judge the trace B by the trace A; each is a run with a trace, or a trace.

    A's nudged runs are expected in it, as `noise-1`, `noise-2` …, and `noise-101` … where B's dropout drops other
    elements than A's, which those do, too; `nudge(a, whether it does)` may make them.
    """
    left, right = open_trace(a), open_trace(b)
    _require_comparable(left, right)
    redrawn = drops_otherwise(left, right)
    if nudge is not None:
        nudge(a, redrawn)
    noise = open_noise(a, left, redrawn)
    vocabulary = cut_alike(left, right, noise)
    return judge(left, right, Estimate(left, noise), vocabulary)


def command(
    a: Path, b: Path, *, nudge: Callable[[Path, bool], None], show_all: bool, as_json: bool, report: Path | None
) -> int:
    """Print the judgement of the run B by the run A; its exit code."""
    from tpcheck.trace.compare.text import lines

    comparison = compare(a, b, nudge)
    if report is not None:
        from tpcheck.trace.compare.report import write

        write(comparison, a, b, report)
    if as_json:
        print(json.dumps(to_json(comparison), indent=1))
    else:
        print("\n".join(lines(comparison, show_all=show_all)))
        if report is not None:
            print(f"report  {report}")
    return EXIT_CODES[comparison.verdict]


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything found; infinities and NaN, which JSON does not have, as null."""
    return {
        "verdict": comparison.verdict,
        "first_suspect": _row(comparison.first) if comparison.first else None,
        "first_difference": _row(comparison.first_difference) if comparison.first_difference else None,
        "a": {"path": str(comparison.a.path), "tp": comparison.a.tp, "dp": comparison.a.dp},
        "b": {"path": str(comparison.b.path), "tp": comparison.b.tp, "dp": comparison.b.dp},
        "vocabulary": comparison.vocabulary,
        "notes": comparison.notes,
        "unmapped": comparison.unmapped,
        "tensors": [_row(row) for row in comparison.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    flat = {
        **row.key._asdict(),
        "layer": row.layer,
        "verdict": row.verdict,
        "why": row.why,
        "dtype": row.dtype,
        "shape": list(row.shape),
        **dataclasses.asdict(row.numbers),
        "estimate": row.estimate.overall if row.estimate else None,
        "excess": row.excess,
    }
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in flat.items()}


def _require_comparable(a: Trace, b: Trace) -> None:
    if a.dtype != b.dtype:
        raise TpcheckError(f"A computes in {a.dtype}, B in {b.dtype}: trace both in the same dtype")
    if a.sample != b.sample:
        raise TpcheckError(f"A keeps every {a.sample}th index, B every {b.sample}th: trace both with the same sample")
    if not set(a.steps) & set(b.steps):
        raise TpcheckError(f"A has steps {a.steps}, B has {b.steps}: trace a step that both have")
    shapes = [_parameters(trace) for trace in (a, b)]
    common = shapes[0].keys() & shapes[1].keys()
    if shapes[0] and shapes[1] and not common:
        raise TpcheckError(
            f"no parameter has the same name in both: {min(shapes[0])} in A, {min(shapes[1])} in B: different models"
        )
    sizes = padding(a, b)
    unlike = [name for name in sorted(common) if not _alike(shapes[0][name], shapes[1][name], a, b)]
    unlike = [name for name in unlike if not (sizes and along_vocabulary(name))]
    if len(unlike) > len(common) / 2:
        name = unlike[0]
        x, y = shapes[0][name], shapes[1][name]
        raise TpcheckError(f"different models: {name} is {list(x)} in A and {list(y)} in B")
    if not a.records.keys() & b.records.keys():
        raise TpcheckError("the traces have no tensor in common: were different modules or kinds traced?")


def _alike(x: tuple[int, ...], y: tuple[int, ...], a: Trace, b: Trace) -> bool:
    """Whether shapes are equal, or but for what tensor parallelism divides."""
    apart = [(one, other) for one, other in zip(x, y, strict=False) if one != other]
    if len(x) != len(y) or len(apart) > 1:
        return False
    return all(any(max(pair) == min(pair) * tp for tp in (a.tp, b.tp)) for pair in apart)


def _parameters(trace: Trace) -> dict[str, tuple[int, ...]]:
    return {
        key.name: tuple(held[0][2]["shape"]) for key, held in trace.records.items() if key.kind in ("start", "grad")
    }

"""`tpcheck diff` on the terminal and as JSON: what `tpcheck.checkpoint.diff` found, in a few lines."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

from tpcheck.checkpoint.diff import Report, TensorDifference, diff
from tpcheck.checkpoint.digest import digest_with_progress

__all__ = ["command", "lines"]

SHOWN = 10  # tensors, without --all


def command(a: Path, b: Path, *, show_all: bool, verify: bool, as_json: bool) -> int:
    """`tpcheck diff A B`."""
    report = diff(a, b, digest_with_progress, verify)
    if as_json:
        print(json.dumps({"answer": report.answer, **dataclasses.asdict(report)}, indent=1, default=str))
    else:
        print("\n".join(lines(report, max(len(report.tensors), len(report.beside)) if show_all else SHOWN)))
    return report.exit_code


def lines(report: Report, shown: int = SHOWN) -> Iterator[str]:
    """The report, with at most `shown` of the tensors that differ."""
    yield f"A  {report.a}"
    yield f"B  {report.b}"
    for key, (x, y) in report.config.items():
        yield f"config  {key}: {_plain(x)} in A, {_plain(y)} in B"
    if report.first:
        yield f"step {report.first.step} is the first that differs"
        for name, (x, y) in report.first.values.items():
            yield f"  {name:10} {x} in A, {y} in B{_decimal(x, y)}"
    elif report.steps:
        yield f"steps  all {report.steps} on both sides are equal"
    yield from _tensors(report, shown)
    for name, (x, y) in list(report.beside.items())[:shown]:
        yield f"beside  {name}: {x} in A, {y} in B"
    if len(report.beside) > shown:
        yield f"beside  … and {len(report.beside) - shown} more, with --all"
    if report.recorded:
        yield f"digests  of {' and '.join(report.recorded)} on record; --verify computes them anew from the checkpoints"
    for doubt in report.doubts:
        yield f"note  {doubt}"
    yield report.answer


def _tensors(report: Report, shown: int) -> Iterator[str]:
    state = "" if report.state is None else f" at step {report.state}"
    for part, compared in report.compared.items():
        if compared:
            differing = sum(tensor.part == part for tensor in report.tensors)
            count = (
                f"all {compared} tensors are equal" if not differing else f"{differing} of {compared} tensors differ"
            )
            yield f"{part}{state}  {count}"
    listed = report.tensors[:shown]
    width = max((len(tensor.name) for tensor in listed), default=0)
    for tensor in listed:
        yield f"  {tensor.name:{width}}  {_how(tensor)}"
    if hidden := len(report.tensors) - len(listed):
        yield f"  … and {hidden} more, with --all"


def _how(tensor: TensorDifference) -> str:
    kind = f"{tensor.dtype}{list(tensor.shape)}"
    found = tensor.elements
    if found is None:
        return f"{kind}: digests differ"
    size = math.prod(tensor.shape)
    text = f"{kind}: {found.differing} of {size} elements"
    if found.max_abs is not None:
        text += f", max abs {found.max_abs:.3g}"
    if found.max_ulp is not None:
        text += f", max {found.max_ulp} ulp"
    return text + (f", {found.nan} NaN on a side" if found.nan else "")


def _plain(value: object) -> str:
    return "absent" if value is None else json.dumps(value, default=str)


def _decimal(x: str, y: str) -> str:
    try:
        return f"  ({float.fromhex(x):.9g}, {float.fromhex(y):.9g})"
    except ValueError:
        return ""

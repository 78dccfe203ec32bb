"""Tensors that have one shape in A and another in B because nobody said, or somebody said wrongly, that they are cut.

A at TP=1  [8]          B at TP=2  rank 0 [4], rank 1 [4], neither marked         ─►  [8], put side by side
A at TP=1  [8]          B at TP=2  [16]: each rank's whole [8], marked as cut     ─►  [8], one over the other
"""

from __future__ import annotations

from collections.abc import Iterator

from tpcheck.trace.compare.logical import Key
from tpcheck.trace.compare.reader import Trace

__all__ = ["put_straight"]

PARAMETERS = ("start", "resumed", "grad", "weight", "state", "update")


def put_straight(a: Trace, b: Trace, others: list[Trace]) -> Iterator[tuple[str, str]]:
    """Read such tensors as what they are from now on, `others` as A; parameters by name, with what is said of each."""
    said = set()
    for key in a.records.keys() & b.records.keys():
        for label, one, other in (("B", b, a), ("A", a, b)):
            found = _cut(one, other, key)
            if found is None:
                continue
            for trace in (one, *(others if one is a else ())):
                if key in trace.records:
                    trace.recuts[key] = found
            dim, apart = found
            if key.kind.partition(".")[0] in PARAMETERS and key.name not in said and one.megatron:
                said.add(key.name)
                yield key.name, _words(label, one.tp, dim, apart)
            break


def _words(label: str, tp: int, dim: int, apart: bool) -> str:
    if apart:
        return (
            f"in {label} the {tp} tensor-parallel ranks hold parts of it along dimension {dim}, and it is not marked "
            "so (tensor_model_parallel): rank 0's part alone enters the gradient norm and the checkpoint"
        )
    return (
        f"in {label} it is marked as cut along dimension {dim} (tensor_model_parallel), while each of the {tp} "
        "tensor-parallel ranks holds all of it: it enters the gradient norm once a rank"
    )


def _cut(one: Trace, other: Trace, key: Key) -> tuple[int, bool] | None:
    """Along which dimension `one`'s boxes of `key` are to be put apart (True), or over each other."""
    if one.tp == 1 or key in one.cuts:
        return None
    shapes = [{tuple(record["shape"]) for _, _, record in trace.records[key]} for trace in (one, other)]
    if any(len(found) != 1 for found in shapes):
        return None
    x, y = (found.pop() for found in shapes)
    apart = [dim for dim in range(len(x)) if len(x) == len(y) and x[dim] != y[dim]]
    if len(apart) != 1 or x[apart[0]] is None or y[apart[0]] is None:
        return None
    here, there = x[apart[0]] or 0, y[apart[0]] or 0
    if here * one.tp == there:
        return apart[0], True
    if here == there * one.tp:
        return apart[0], False
    return None

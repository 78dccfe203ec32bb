"""How small an error of each kind of tensor would have been found: what "rounding" says, as a number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tpcheck.trace.compare.comparison import Comparison, Row
from tpcheck.trace.compare.excess import TURNING, limit

__all__ = ["Limits", "limits"]


@dataclass(frozen=True)
class Limits:
    """Of all tensors of a kind: the smallest errors that are found, relative, for half of them and for the worst.

    Attributes:
        any_error: of whatever direction, by norms.
        factor: common to all elements; None of kinds that are not held against one.
    """

    kind: str
    tensors: int
    any_error: tuple[float, float]
    factor: tuple[float, float] | None


def limits(comparison: Comparison) -> Iterator[Limits]:
    """The limits of every kind for which rounding has been estimated, in the order of execution."""
    kinds: dict[str, list[Row]] = {}
    for row in comparison.rows:
        if row.estimate is not None and row.estimate.overall and row.key.kind not in ("clip", "again"):
            kinds.setdefault(row.key.kind, []).append(row)
    for kind, rows in kinds.items():
        found = [limit(row.estimate, row.numbers.size, comparison.seeds) for row in rows if row.estimate is not None]
        factors = None if kind in TURNING else _half_and_worst([factor for _, factor in found])
        yield Limits(kind, len(rows), _half_and_worst([overall for overall, _ in found]), factors)


def _half_and_worst(values: Sequence[float]) -> tuple[float, float]:
    return float(np.median(values)), float(max(values))

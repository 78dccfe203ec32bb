"""What a comparison finds: a row a tensor or setting, and all of them together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tpcheck.trace.compare.logical import Key
from tpcheck.trace.compare.metrics import Distance, Numbers
from tpcheck.trace.compare.reader import Trace
from tpcheck.trace.module_names import layer_of

__all__ = ["Comparison", "Row", "Verdict"]

Verdict = Literal["identical", "rounding", "suspect", "other weights", "other vocabulary", "unknown"]


@dataclass(frozen=True)
class Row:
    """One logical tensor of both traces.

    Attributes:
        estimate: how far rounding may take it; None where nothing has been estimated.
        apart: the distance that is held against it; None of a setting.
        excess: the distance over what is allowed, of all measures the most; above 1 it is suspect.
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
    apart: Distance | None = None

    @property
    def layer(self) -> int | None:
        return layer_of(self.key.name)


@dataclass
class Comparison:
    """What `judge` found, rows in execution order; `unmapped` says what could not be compared, and why.

    `vocabulary` are the sizes that A and B pad theirs to, where they differ; `drawn`, how many parameters start with
    values that are drawn at random, known where some start otherwise; `notes` are other things to know; `seeds` is how
    many nudged runs of A there are.
    """

    a: Trace
    b: Trace
    vocabulary: tuple[int, int] | None = None
    drawn: int = 0
    rows: list[Row] = field(default_factory=list)
    unmapped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seeds: int = 0

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

"""`tpcheck compare` on the terminal: the verdict, the first suspect, and a table in execution order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from tpcheck.trace.compare.comparison import Comparison, Row
from tpcheck.trace.compare.limits import Limits, limits
from tpcheck.trace.compare.reader import Trace

__all__ = ["KINDS", "layout", "lines", "padded", "sentence", "what"]

KINDS = {
    "settings": "setting",
    "start": "initial weight",
    "input": "input",
    "in": "input of a layer",
    "out": "output",
    "mask": "what is dropped",
    "loss": "loss",
    "again": "recomputed output",
    "dout": "gradient of output",
    "din": "gradient of input",
    "grad": "parameter gradient",
    "clip": "clip coefficient",
    "update": "update",
    "weight": "updated weight",
    "resumed.weight": "weight, as resumed",
}
SURER = (
    ". The surest way to tell: trace both runs with dtype=fp32, where a bug stands out a thousandfold, or under "
    "strategy=tree, where any difference is one"
)
DOUBTFUL = 0.5  # of the limit
SEEN = ("out", "dout", "grad", "update")
SHOWN = 24
NAMED = 3


def lines(comparison: Comparison, *, show_all: bool = False) -> Iterator[str]:
    """The comparison; without `show_all`, the rows that say most."""
    a, b = comparison.a, comparison.b
    yield f"A  {a.path}  {layout(a)} {a.dtype}"
    yield f"B  {b.path}  {layout(b)} {b.dtype}"
    rows = comparison.rows if show_all else _telling(comparison)
    if rows:
        yield ""
        yield from _table(rows)
        if hidden := len(comparison.rows) - len(rows):
            yield f"… {hidden} more tensors, with --all"
        yield ""
    if vocabulary := padded(comparison):
        yield f"vocabulary  {vocabulary}"
    for note in comparison.notes:
        yield f"note  {note}"
    for note in comparison.unmapped[: None if show_all else 5]:
        yield f"not compared  {note}"
    if not show_all and len(comparison.unmapped) > 5:
        yield f"not compared  … and {len(comparison.unmapped) - 5} more"
    if seen := "; ".join(_seen(one) for one in limits(comparison) if one.kind in SEEN):
        yield f"would be found  {seen}"
    counts = Counter(row.verdict for row in comparison.rows)
    yield "tensors  " + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    if comparison.first_difference:
        yield f"first that differs  {what(comparison.first_difference)}"
    yield sentence(comparison)


def layout(trace: Trace) -> str:
    """The sizes of parallelism."""
    return f"TP={trace.tp} DP={trace.dp}" + (f" PP={trace.pp}" if trace.pp > 1 else "")


def sentence(comparison: Comparison) -> str:
    """The verdict in a sentence or two."""
    first = comparison.first
    left_out = f"; {len(comparison.unmapped)} were not compared" if comparison.unmapped else ""
    if first is not None:
        text = f"suspect: {what(first)}"
        if first.estimate is not None and first.excess > 1 and math.isfinite(first.numbers.max_abs):
            text += f" is off by {first.numbers.relative:.2g}, where rounding explains {first.estimate.overall:.1g}"
        return text + (f"; {first.why}" if first.why else "")
    if comparison.other_weights or comparison.verdict == "other vocabulary":
        verdict = "not rounding" if comparison.other_weights else "nothing suspect, though not the same"
        return f"{verdict}: {'; '.join(_other_runs(comparison))}{left_out}"
    if not comparison.rows:
        return "can't tell: no tensor of one trace could be compared with the other's"
    if comparison.verdict == "unknown":
        return _cannot_tell(comparison)
    if comparison.verdict == "rounding":
        worst = max((row for row in comparison.rows if row.verdict == "rounding"), key=lambda row: row.excess)
        limit = f"the nearest, {what(worst)}, is at {worst.excess:.0%} of the limit"
        surer = SURER if worst.excess > DOUBTFUL else ""
        return f"rounding: no tensor is beyond what rounding explains; {limit}{left_out}{surer}"
    return f"identical: every tensor that has been compared, bit for bit{left_out}"


def _cannot_tell(comparison: Comparison) -> str:
    dropped = next((row for row in comparison.rows if row.key.kind == "mask" and row.verdict == "unknown"), None)
    if dropped is not None:
        return (
            f"can't tell: {what(dropped)} is not the same in both runs, as it need not be at two layouts, and what "
            "follows from it cannot be compared; before it, no tensor is beyond what rounding explains. Trace both "
            "runs with dropout 0"
        )
    return (
        "can't tell: the runs differ, and A has no nudged runs to say by how much rounding may: "
        "trace A again into its folders noise-1, noise-2, noise-3 with perturb=1, 2, 3"
    )


def _seen(one: Limits) -> str:
    """A kind's limits, for half of its tensors."""
    factor = f", or a factor of 1 ± {one.factor[0]:.1g}" if one.factor else ""
    return f"{KINDS.get(one.kind, one.kind)}s off by {one.any_error[0]:.1g}{factor}"


def padded(comparison: Comparison) -> str:
    """What is said of vocabularies that are padded differently; nothing where they are not."""
    if comparison.vocabulary is None:
        return ""
    a, b = comparison.vocabulary
    return (
        f"the vocabularies are padded differently, A's to {a} and B's to {b}: {min(a, b)} are compared; the padded "
        "logits are in every loss, so that losses and gradients are not the same function's"
    )


def _other_runs(comparison: Comparison) -> Iterator[str]:
    if other := comparison.other_weights:
        names = ", ".join(row.key.name for row in other[:NAMED]) + (", …" if len(other) > NAMED else "")
        yield (
            f"the runs start from other weights: {len(other)} of {comparison.drawn} parameters that are drawn at "
            f"random differ ({names}); let B load what A starts from, nothing after it can be judged"
        )
    if vocabulary := padded(comparison):
        yield vocabulary
        if not comparison.other_weights:
            yield "before the losses, no tensor is beyond what rounding explains"


def what(row: Row) -> str:
    resumed = ", as resumed" if row.key.kind.startswith("resumed") else ""
    kind = KINDS.get(row.key.kind, f"optimizer {row.key.kind.partition('.')[2]}{resumed}")
    return f"{row.key.name} ({kind}, step {row.key.step})"


def _telling(comparison: Comparison) -> list[Row]:
    """Of those that differ: those about the first suspect, initial weights, or else those nearest to the limit."""
    if comparison.first is None and comparison.other_weights:
        return comparison.other_weights[:SHOWN]
    differing = [row for row in comparison.rows if row.verdict != "identical"]
    if comparison.first is not None:
        place = differing.index(comparison.first)
        start = max(0, place - SHOWN // 3)
        return differing[start : start + SHOWN]
    chosen = sorted(differing, key=lambda row: -row.excess)[:SHOWN]
    return [row for row in differing if row in chosen]


def _table(rows: list[Row]) -> Iterator[str]:
    names = [f"{row.key.step} {row.key.kind:5} {row.key.name}" for row in rows]
    width = max(map(len, names))
    headings = ("relative", "rounding", "max abs", "mean abs", "median", ">1e-3", ">1e-2", "ulp", "cosine")
    yield f"{'step, kind, tensor':{width}}  " + " ".join(f"{heading:>9}" for heading in headings)
    for name, row in zip(names, rows, strict=True):
        n = row.numbers
        estimate = f"{row.estimate.overall:.2e}" if row.estimate else "-"
        cells = (
            f"{n.relative:.2e}", estimate, f"{n.max_abs:.2e}", f"{n.mean_abs:.2e}", f"{n.median_abs:.2e}",
            f"{n.over[1]:.1%}", f"{n.over[3]:.1%}", "-" if n.ulp is None else f"{n.ulp:.2g}", f"{n.cosine:.6f}",
        )  # fmt: skip
        yield f"{name:{width}}  " + " ".join(f"{cell:>9}" for cell in cells) + f"  {row.verdict}"

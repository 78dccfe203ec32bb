"""Runs cases, lets `tpcheck compare` judge them, and keeps the table.

reference (one rank, no bug) + nudged runs ─┐
                                            ├─ compare ─► flagged? first suspect named?
candidate (layout of the case, bug) ────────┘
the same layout without the bug ── effect: how far the bug moves loss, gradients, weights
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.silent_bugs.case import QWEN3, Bug, Clean
from tpcheck.config.load import parse_run
from tpcheck.run.launch import launch
from tpcheck.run.nudged import make_nudged_runs
from tpcheck.trace.compare.command import EXIT_CODES, compare
from tpcheck.trace.compare.comparison import Verdict
from tpcheck.trace.compare.estimate import open_trace
from tpcheck.trace.compare.metrics import distance
from tpcheck.trace.compare.reader import Trace

__all__ = ["Answer", "Benchmark", "table", "to_json"]

BASE = {"model": QWEN3, "strategy": "stock", "layers": "local", "steps": 2, "seq_length": 32}
TRACE = {"steps": [0, 1]}
FELT = ("start", "input", "grad", "clip", "weight")  # and the loss, the output of the model


@dataclass(frozen=True)
class Answer:
    """What the detector said of a case.

    Attributes:
        effect: the bug's, relative, on the loss, gradient or weight that it moves most.
        first_suspect: "<kind> <module>, step <n>", empty if none.
        verdict: as `tpcheck compare` says it.
        nearest: of what is rounding, how near the nearest is to the limit, where 1 is the limit.
        not_compared: how many tensors are not.
    """

    case: Clean
    flagged: bool
    first_suspect: str
    named: bool
    why: str
    effect: float
    verdict: Verdict = "unknown"
    nearest: float = 0.0
    not_compared: int = 0

    @property
    def right(self) -> bool:
        return self.named if isinstance(self.case, Bug) else EXIT_CODES[self.verdict] == 0


class Benchmark:
    """Runs in `folder`; what cases share, references and clean layouts, is run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[str, Path] = {}
        self.begun = 0

    def answer(self, case: Clean) -> Answer:
        """Run `case` and have it judged; its own run is removed afterwards."""
        reference = self._once(case, {})
        is_bug = isinstance(case, Bug)
        candidate = self.candidate(case)
        with _quiet(), case.world():
            found = compare(reference, candidate, functools.partial(make_nudged_runs, seeds=3))
        first = found.first or next(iter(found.other_weights), None)
        named = first is not None and is_bug and any(
            fnmatchcase(f"{first.key.kind} {first.key.name}", pattern) for pattern in case.suspects  # type: ignore[attr-defined]
        )  # fmt: skip
        answer = Answer(
            case,
            EXIT_CODES[found.verdict] == 1,
            f"{first.key.kind} {first.key.name}, step {first.key.step}" if first else "",
            named,
            first.why if first else "",
            self.effect(case, candidate) if is_bug else 0.0,
            found.verdict,
            max((row.excess for row in found.rows if row.verdict == "rounding"), default=0.0),
            len(found.unmapped),
        )
        shutil.rmtree(candidate)
        return answer

    def candidate(self, case: Clean) -> Path:
        """The run of `case`, with its bug if it has one."""
        path = self.folder / f"candidate {case.name}"
        with case.world():
            if case.resume:
                _train(path, case.settings, case.layout, trace=None, stop_after=case.resume)
            with case.inject():
                return _train(path, case.settings, case.layout, resume=bool(case.resume))

    def effect(self, case: Clean, candidate: Path) -> float:
        """How far `candidate` is from the same layout without the bug, where it is farthest."""
        return max(_differences(open_trace(self._once(case, case.layout)), open_trace(candidate)), default=0.0)

    def _once(self, case: Clean, layout: dict[str, Any]) -> Path:
        """The run of a case's world in `layout`, with nothing injected."""
        key = json.dumps([case.settings, layout, getattr(case.world, "__name__", "")], sort_keys=True)
        if key not in self.runs:
            self.begun += 1
            with case.world():
                self.runs[key] = _train(self.folder / f"run-{self.begun}", case.settings, layout)
        return self.runs[key]


def _train(path: Path, settings: dict[str, Any], layout: dict[str, Any], resume: bool = False, **changes: Any) -> Path:
    config = parse_run({**BASE, "trace": TRACE, **settings, **layout, **changes, "output": str(path)})
    with _quiet():
        code = launch(config, resume)
    if code:
        raise RuntimeError((path / "log.txt").read_text()[-2000:])
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Runs say how they get on, ranks by themselves; here nobody asks."""
    sys.stdout.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        yield
    finally:
        sys.stdout.flush()
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
        for descriptor in (*kept, nowhere):
            os.close(descriptor)


def _differences(a: Trace, b: Trace) -> Iterator[float]:
    for key in a.records.keys() & b.records.keys():
        if key.kind not in FELT and key.name != "model":
            continue
        x, y = a.logical(key), b.logical(key)
        if isinstance(x, str) or isinstance(y, str) or (x.dtype, x.bits.shape) != (y.dtype, y.bits.shape):
            continue
        yield distance(x, y).overall
        if y.replicas is not None:
            yield y.replicas.distance


def to_json(answers: Iterable[Answer]) -> list[dict[str, Any]]:
    return [
        {
            "name": a.case.name,
            "kind": "bug" if isinstance(a.case, Bug) else "clean",
            "flagged": a.flagged,
            "named": a.named,
            "first_suspect": a.first_suspect,
            "source": a.case.source if isinstance(a.case, Bug) else "",
        }
        for a in answers
    ]


def table(answers: Iterable[Answer]) -> str:
    """Two tables in Markdown, and the score above them."""
    every = list(answers)
    bugs = [a for a in every if isinstance(a.case, Bug)]
    clean = [a for a in every if not isinstance(a.case, Bug)]
    lines = [
        f"{sum(a.flagged for a in bugs)} of {len(bugs)} bugs flagged, {sum(a.named for a in bugs)} with the right "
        f"module first, of {len({a.case.kind for a in bugs})} kinds; {sum(a.flagged for a in clean)} of {len(clean)} "  # type: ignore[attr-defined]
        "clean configurations flagged.",
        "",
        "| bug | kind | what is wrong | layout | moves loss, gradients or weights by | first suspect | looks like "
        "| source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for a in bugs:
        mark = "" if a.named else " (wrong)" if a.flagged else "**missed**"
        link = f"[{_short(a.case.source)}]({a.case.source})" if a.case.source else ""  # type: ignore[attr-defined]
        cells = (
            a.case.name,
            a.case.kind,
            a.case.sentence,
            _layout(a.case),
            f"{a.effect:.1e}",
            a.first_suspect + mark,
            a.why,
            link,
        )  # type: ignore[attr-defined]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "| clean configuration | flagged | verdict | nearest to the limit |", "|---|---|---|---|"]
    lines += [
        f"| {a.case.name} | {'**yes**, ' + a.first_suspect if a.flagged else 'no'} | {a.verdict} | {a.nearest:.0%} |"
        for a in clean
    ]
    return "\n".join(lines) + "\n"


def _layout(case: Clean) -> str:
    return ", ".join(
        f"{key}={value}" for key, value in {**case.layout, "dtype": case.settings.get("dtype", "bf16")}.items()
    )


def _short(source: str) -> str:
    *_, project, _, number = source.split("/")
    return f"{project} {number}"

"""HTML and PNG report of a sweep: loss.png, and index.html with picture, verdict and every digest in one file."""

from __future__ import annotations

from html import escape
from pathlib import Path

from tpcheck.files.names import PAGE, PICTURE
from tpcheck.pages.html import document, image, table
from tpcheck.sweep import plot
from tpcheck.sweep.spec import Sweep, only_size
from tpcheck.sweep.verdict import Verdict

__all__ = ["write"]


def write(sweep: Sweep, verdict: Verdict) -> list[Path]:
    """Write picture and page into the sweep's output, return their paths; no picture before two cells have losses."""
    picture, page = sweep.output / PICTURE, sweep.output / PAGE
    found = plot.curves(sweep)
    if found:
        plot.draw(found, _title(found), _subtitle(sweep), picture)
    else:
        picture.unlink(missing_ok=True)
    page.write_text(_page(sweep, verdict, picture if found else None), encoding="utf-8")
    return [picture, page] if found else [page]


def _title(found: list[plot.Curve]) -> str:
    only_tp = only_size([curve.variant for curve in found]) == "TP"
    return f"Same model, data and seed; only the {'tensor-parallel size' if only_tp else 'parallel layout'} differs"


def _subtitle(sweep: Sweep) -> str:
    runs = [cell.config for cell in sweep.cells]
    models = {run.model.preset or "a custom model" for run in runs}
    facts = [*models, *{run.dtype for run in runs}, f"{max(run.steps for run in runs)} steps"]
    return f"{sweep.name}: {', '.join(facts)}"


def _page(sweep: Sweep, verdict: Verdict, picture: Path | None) -> str:
    drawn = image(picture.read_bytes(), "distance of the losses from the reference, by step") if picture else ""
    mood = {0: "held", 1: "broken"}.get(verdict.exit_code, "")
    details = f"<pre>{escape(chr(10).join(verdict.details()))}</pre>" if verdict.details() else ""
    cells = [
        (name, digests.model if digests else "missing", (digests.optimizer or "") if digests else "")
        for group in verdict.groups
        for name, digests in group.cells.items()
    ]
    return document(
        sweep.name,
        f"""<p class="verdict {mood}">{escape(verdict.sentence())}</p>{details}
{drawn}
<h2>Groups: cells that differ only in what must not matter</h2>
{table(("group", "cells", "model", "optimizer", "verdict"), verdict.rows())}
<h2>Digests of every cell</h2>
{table(("cell", "model", "optimizer"), cells, code=True)}""",
    )

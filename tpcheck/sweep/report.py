"""What a sweep leaves for eyes: loss.png, and index.html with picture, verdict and every digest in one file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tpcheck.files.names import PAGE, PICTURE
from tpcheck.sweep import plot
from tpcheck.sweep.spec import Sweep, only_size
from tpcheck.sweep.verdict import Verdict

__all__ = ["document", "image", "table", "write"]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.verdict { padding: .7rem 1rem; border-left: .4rem solid #999; background: #f2f2f2 }
.held { border-color: #009e73 } .broken { border-color: #d55e00 }
table { border-collapse: collapse }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #ddd }
p, li, code { overflow-wrap: anywhere } code { font-size: .8em } td:first-child { white-space: nowrap }
img { max-width: 100% } .scroll { overflow-x: auto }
"""


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


def document(title: str, body: str, style: str = "") -> str:
    """A whole page that needs no other file."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>
<h1>{escape(title)}</h1>
{body}
</body></html>
"""


def image(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], code: bool = False) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    mark = "<td><code>{}</code></td>" if code else "<td>{}</td>"
    body = "".join("<tr>" + "".join(mark.format(escape(value)) for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


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

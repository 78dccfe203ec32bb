"""The comparison as one HTML file: the verdict, pictures, and a table of every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from tpcheck.files import result_dir
from tpcheck.pages import html
from tpcheck.trace.compare import pictures
from tpcheck.trace.compare.comparison import Comparison, Row
from tpcheck.trace.compare.limits import limits
from tpcheck.trace.compare.text import KINDS, layout, padded, sentence, what

__all__ = ["write"]

MOOD = {
    "identical": "held", "rounding": "held", "suspect": "broken", "other weights": "broken",
    "other vocabulary": "broken",
}  # fmt: skip
STYLE = """
figure { margin: 0 } figcaption { font-size: .85rem; color: #555 }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1.5rem }
.numbers { font-size: .8rem; font-variant-numeric: tabular-nums } .numbers td { white-space: nowrap }
.numbers .suspect { background: #fbe3d6 } details summary { cursor: pointer; margin: 1rem 0 }
"""
HEADINGS = (
    "step", "kind", "tensor", "verdict", "relative", "rounding", "max abs", "mean abs", "median abs",
    "> 1e-4", "> 1e-3", "> 5e-3", "> 1e-2", "max ulp", "cosine", "‖B‖/‖A‖",
)  # fmt: skip


def write(comparison: Comparison, a: Path, b: Path, path: Path) -> None:
    """Write the report to `path`; `a` and `b` are what was compared, for the losses that are on record there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sides = [result_dir.read_steps(side) if result_dir.is_result(side) else [] for side in (a, b)]
    drawn = (
        (pictures.growth(comparison), "how the error grows over the layers"),
        (pictures.losses(*sides), "the losses of the two runs"),
        (pictures.heat_map(comparison), "the error of each module in each layer"),
    )
    figures = "".join(
        f"<figure>{html.image(png, caption)}<figcaption>{escape(caption)}</figcaption></figure>"
        for png, caption in drawn
        if png
    )
    first = comparison.first_difference
    suspects = [row for row in comparison.rows if row.verdict == "suspect"]
    layouts = [f"{label}: {side.path}, {layout(side)}, {side.dtype}" for label, side in
               (("A", comparison.a), ("B", comparison.b))]  # fmt: skip
    body = f"""<p class="verdict {MOOD.get(comparison.verdict, "")}">{escape(sentence(comparison))}</p>
<p><code>{"<br>".join(map(escape, layouts))}</code></p>
<p>{f"The first tensor that differs: {escape(what(first))}." if first else ""}</p>
<div class="pictures">{figures}</div>
{"<h2>Suspect, in the order of execution</h2>" + _numbers(suspects[:40]) if suspects else ""}
{f"<p>Vocabulary: {escape(text)}.</p>" if (text := padded(comparison)) else ""}
{_notes(comparison)}
{_limits(comparison)}
{_unmapped(comparison)}
<details><summary>All {len(comparison.rows)} tensors</summary>{_numbers(comparison.rows)}</details>"""
    path.write_text(html.document("Rounding or bug?", body, STYLE), encoding="utf-8")


def _notes(comparison: Comparison) -> str:
    return "".join(f"<p>{escape(note)}.</p>" for note in comparison.notes)


def _limits(comparison: Comparison) -> str:
    """How small an error of each kind would have been found."""
    found = list(limits(comparison))
    if not found:
        return ""
    headings = ("kind", "tensors", "off by", "worst", "a common factor of 1 ±", "worst")
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    rows = []
    for one in found:
        numbers = (*one.any_error, *(one.factor or ()))
        cells = (KINDS.get(one.kind, one.kind), str(one.tensors), *(f"{number:.1e}" for number in numbers))
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return (
        "<h2>What would have been found</h2><p>Errors above these, relative to the tensor, are beyond what rounding "
        "explains: for half of the tensors of a kind, and for the one where it explains most.</p>"
        f'<div class="scroll"><table class="numbers"><tr>{head}</tr>{"".join(rows)}</table></div>'
    )


def _unmapped(comparison: Comparison) -> str:
    if not comparison.unmapped:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in comparison.unmapped)
    return f"<details><summary>{len(comparison.unmapped)} tensors not compared</summary><ul>{items}</ul></details>"


def _numbers(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in map(escape, HEADINGS))
    body = "".join(
        f'<tr class="{row.verdict}">' + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="numbers"><tr>{head}</tr>{body}</table></div>'


def _cells(row: Row) -> tuple[str, ...]:
    n = row.numbers
    return (
        str(row.key.step), row.key.kind, row.key.name, row.verdict, f"{n.relative:.2e}",
        f"{row.estimate.overall:.2e}" if row.estimate else "–", f"{n.max_abs:.2e}", f"{n.mean_abs:.2e}",
        f"{n.median_abs:.2e}", *(f"{share:.2%}" for share in n.over), "–" if n.ulp is None else f"{n.ulp:.3g}",
        f"{n.cosine:.6f}", f"{n.norm_b / n.norm_a:.4f}" if n.norm_a else "–",
    )  # fmt: skip

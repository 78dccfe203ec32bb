"""A study's page as one HTML file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from tpcheck.pages import html
from tpcheck.study.page import Block, Heading, Page, Paragraph, Picture, Table
from tpcheck.study.record import Footer
from tpcheck.study.study import Finding, Study

__all__ = ["to_html"]

STYLE = """
figure { margin: 1.5rem 0 } figcaption, .caption { font-size: .85rem; color: #555; margin: .8rem 0 .3rem }
td, th { font-size: .85rem; font-variant-numeric: tabular-nums; white-space: nowrap }
.findings td { white-space: normal; min-width: 8rem; vertical-align: top } .answer { font-size: 1.1rem }
.findings .verdict-holds { color: #00664a } .findings .verdict-only { color: #8a5a00 }
.findings .verdict-not { color: #a34700 } details summary { cursor: pointer; margin: 1rem 0 }
"""


def to_html(study: Study, page: Page, findings: Sequence[Finding], footer: Footer) -> str:
    """The page: question, answer, picture, findings, blocks, how to run it, versions."""
    body = "\n".join([
        f'<p class="answer">{_inline(page.answer)}</p>',
        _block(page.picture),
        "<h2>Claims, and what became of them</h2>",
        _findings(findings),
        *map(_block, page.blocks),
        "<h2>How to run it</h2>",
        f"<p><code>{escape(footer.command)}</code></p>",
        f"<p>{escape(footer.took)}</p>",
        html.table(("", ""), footer.versions),
    ])  # fmt: skip
    return html.document(study.question, body, STYLE)


def _findings(findings: Iterable[Finding]) -> str:
    rows = "".join(
        f'<tr><td>{_inline(one.claim)}</td><td class="verdict-{_mood(one.verdict)}">{_inline(one.verdict)}</td>'
        f"<td>{_inline(one.evidence)}</td></tr>"
        for one in findings
    )
    head = "<tr><th>claim</th><th>verdict</th><th>measured</th></tr>"
    return f'<div class="scroll"><table class="findings">{head}{rows}</table></div>'


def _mood(verdict: str) -> str:
    return {"holds": "holds", "does not hold": "not"}.get(verdict, "only")


def _block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_inline(text)}</h2>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Picture(png, caption):
            return f"<figure>{html.image(png, caption)}<figcaption>{_inline(caption)}</figcaption></figure>"
        case Table(headings, rows, caption, folded):
            drawn = html.table([_inline(heading) for heading in headings], rows)
            if folded:
                return f"<details><summary>{_inline(caption)}</summary>{drawn}</details>"
            return (f'<p class="caption">{_inline(caption)}</p>' if caption else "") + drawn


def _inline(text: str) -> str:
    """`code` and [links](address) of an otherwise plain text."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', marked)

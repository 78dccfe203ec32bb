"""Pieces of HTML pages that need no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

__all__ = ["document", "image", "table"]

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


def document(title: str, body: str, style: str = "") -> str:
    """A whole page with `body`, which is HTML; `style` is added to the common one."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>
<h1>{escape(title)}</h1>
{body}
</body></html>
"""


def image(png: bytes, alt: str) -> str:
    """A picture whose bytes are in the page."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], code: bool = False) -> str:
    """A table that scrolls by itself where it is too wide; `code` sets its cells in a fixed width."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    mark = "<td><code>{}</code></td>" if code else "<td>{}</td>"
    body = "".join("<tr>" + "".join(mark.format(escape(value)) for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'

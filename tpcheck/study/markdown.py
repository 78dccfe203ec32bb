"""A study's summary as a README, which a repository's browser shows."""

from __future__ import annotations

from collections.abc import Sequence

from tpcheck.files.names import STUDY_PAGE, STUDY_PICTURE
from tpcheck.study.page import Block, Heading, Page, Paragraph, Picture, Table
from tpcheck.study.record import Footer
from tpcheck.study.study import Finding, Study

__all__ = ["to_markdown"]


def to_markdown(study: Study, page: Page, findings: Sequence[Finding], footer: Footer) -> str:
    """Question, answer, picture, findings, what the page wants repeated, how to run it."""
    claims = Table(("claim", "verdict", "measured"), [(one.claim, one.verdict, one.evidence) for one in findings])
    lines = [
        f"# {study.question}",
        page.answer,
        f"![{page.picture.caption}]({STUDY_PICTURE})",
        f"Every table and picture: [{STUDY_PAGE}]({STUDY_PAGE}).",
        _block(claims),
        *(_block(block) for block in page.summary),
        f"    {footer.command}",
        footer.took,
        ", ".join(f"{name} {found}" for name, found in footer.versions) + ".",
    ]
    return "\n\n".join(filter(None, lines)) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Paragraph(text):
            return text
        case Table(headings, rows, caption, _):
            table = [f"| {' | '.join(map(_cell, cells))} |" for cells in (headings, ["---"] * len(headings), *rows)]
            return "\n".join(([caption, ""] if caption else []) + table)
        case Picture():
            raise ValueError("a README shows one picture, the page's own")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

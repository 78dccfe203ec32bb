"""What a study's page is made of. Texts may hold `code` and [links](address), and nothing else of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Block", "Heading", "Page", "Paragraph", "Picture", "Table"]


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """Cells are texts; `folded` hides a long table behind its caption in HTML, and leaves it out of the README."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG (`tpcheck.pages.figures.png`), at least 600 pixels wide."""

    png: bytes
    caption: str


Block: TypeAlias = Heading | Paragraph | Table | Picture


@dataclass(frozen=True)
class Page:
    """Above the blocks stand the study's question, the answer in two sentences and one picture, then the findings;
    below them how to run it, the machine and the versions, which the house adds.

    Attributes:
        summary: blocks that the README repeats, besides question, answer, picture and findings.
    """

    answer: str
    picture: Picture
    blocks: Sequence[Block]
    summary: Sequence[Block] = ()

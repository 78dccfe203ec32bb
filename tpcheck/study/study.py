"""What a study is made of.

A study is a story in parts. A part measures and gives plain numbers, which go to `<part>.json`; the page is made from
these files alone, so it can be made again without measuring. What the page claims are findings, which tests assert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from typing_extensions import Self

from tpcheck.config.schema import Section
from tpcheck.study.page import Page

__all__ = ["Finding", "Part", "Progress", "Results", "Settings", "Study"]

Results = dict[str, dict[str, Any]]  # of each part by its name


class Settings(Section):
    """What a study may be asked for with `key=value`; the defaults are the full study's."""

    @classmethod
    def quick(cls) -> Self:
        """Settings that take less than two minutes on two cores."""
        raise NotImplementedError


class Progress(Protocol):
    """Where a part says how far it is."""

    def __call__(self, done: float, what: str = "") -> None:
        """`done` of 1; `what` comes next."""


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        run: from settings, what was found, as JSON has it. Not called where it is on record for the same settings and
            versions.
        reads: the settings that `run` depends on, if not on all.
    """

    name: str
    run: Callable[[Any, Progress], dict[str, Any]]
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What became of a claim: `holds`, `holds only if …` or `does not hold`, and the number that says so."""

    claim: str
    verdict: str
    evidence: str

    def __post_init__(self) -> None:
        if self.verdict not in ("holds", "does not hold") and not self.verdict.startswith("holds only if "):
            raise ValueError(f"{self.verdict!r} is no verdict on {self.claim!r}")


@dataclass(frozen=True)
class Study:
    """A question, and how it is answered.

    A study's module is imported before anybody knows whether what it `requires` is there: parts import that.

    Attributes:
        requires: packages beyond the dependencies, by the name that is imported and installed.
        memory_gib: what all ranks take together at their fullest.
        page: from the settings and every part's result.
        findings: likewise.
    """

    name: str
    question: str
    settings: type[Settings]
    requires: tuple[str, ...]
    memory_gib: Callable[[Any], float]
    parts: tuple[Part, ...]
    page: Callable[[Any, Results], Page]
    findings: Callable[[Results], list[Finding]]

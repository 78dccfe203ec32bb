"""A line of the doctor's table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tpcheck.config.schema import RunConfig

__all__ = ["Finding", "Verdict", "unless_stock"]

Verdict = Literal["ok", "no", "note"]


@dataclass(frozen=True)
class Finding:
    """One line of the table; `no` means that something asked for cannot be had."""

    section: Literal["versions", "devices", "sums", "settings", "attention"]
    name: str
    found: str
    verdict: Verdict = "ok"
    why: str = ""


def unless_stock(config: RunConfig) -> Verdict:
    """Of what the patches need: a stock run asks for no patches."""
    return "note" if config.strategy == "stock" else "no"

"""Numbers as tables show them."""

from __future__ import annotations

__all__ = ["percent", "small"]


def small(value: float | None) -> str:
    """Three digits; exactly zero is `0`, which nothing else is."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.2e}"


def percent(share: float) -> str:
    """A share of 1; exactly none is `0`."""
    return "0" if share == 0 else f"{share:.2%}"

"""The trainings among the parts' results."""

from __future__ import annotations

from typing import Any

from tpcheck.study.study import Results

__all__ = ["losses_apart", "trainings"]


def trainings(results: Results) -> dict[str, dict[str, Any]]:
    """By name, in the study's order."""
    return {found["name"]: found for part, found in results.items() if part.startswith("training-")}


def losses_apart(a: dict[str, Any], b: dict[str, Any]) -> list[float]:
    """How far two curves are apart at every step that both have."""
    return [abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=False)]

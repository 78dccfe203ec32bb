"""The studies by name."""

from __future__ import annotations

__all__ = ["STUDIES"]

STUDIES = (
    "tp-vs-dp",
    "frameworks",
    "keras-jax",
    "communication",
)

"""In which order a run's sharded sums are added."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["STRATEGIES", "Strategy"]

Strategy = Literal["stock", "gather", "tree"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

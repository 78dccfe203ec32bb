"""In which order a row-parallel sum and a rank's own product add, found by `tpcheck order`."""

from __future__ import annotations

from typing import Any

from tpcheck.config.strategies import Strategy
from tpcheck.order.command import orders
from tpcheck.order.fprev import formula, to_lists
from tpcheck.order.setting import Setting
from tpcheck.study.study import Progress
from tpcheck.study.tp_vs_dp.settings import SIZES, TpVsDp

__all__ = ["found_orders"]

SUMMANDS = 32
CASES: tuple[tuple[str, Strategy, int], ...] = (  # target, strategy, tokens
    ("row-parallel", "stock", 8),
    ("row-parallel", "tree", 8),
    ("gemm", "stock", 16),
)


def found_orders(settings: TpVsDp, progress: Progress) -> dict[str, Any]:
    """By target and strategy: every order that is behind the TP sizes, and where."""
    found = {}
    for number, (target, strategy, rows) in enumerate(CASES):
        progress(number / len(CASES), f"{target}, {strategy}")
        asked = [Setting(target, strategy, tp, SUMMANDS, rows=rows) for tp in SIZES]
        found[f"{target} {strategy}"] = [
            {"places": one.places, "formula": formula(one.tree), "tree": to_lists(one.tree)} for one in orders(asked)
        ]
    return found

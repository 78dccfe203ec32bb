"""What `tpcheck order` is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from tpcheck.config.strategies import Strategy
from tpcheck.order.fprev import Tree

__all__ = ["TARGETS", "Order", "Setting", "title"]

TARGETS = {
    "row-parallel": "forward of a row-parallel layer, summed over features",
    "column-parallel": "input gradient of a column-parallel layer, summed over output features",
    "gated": "input gradient of a SwiGLU's first layer, summed over output features [gate | up]",
    "norm": "gamma's gradient of an RMSNorm, summed over tokens",
    "gemm": "a rank's own product, summed over features",
    "all-reduce": "all-reduce, summed over ranks",
}


@dataclass(frozen=True)
class Setting:
    """One sum.

    Attributes:
        target: of `TARGETS`.
        size: how many summands; of `all-reduce`, how many ranks.
        rows, columns: tokens and features of the result; they affect stock's order.
        sp: sequence parallelism; `norm` has it always.
        threads: of every rank.
    """

    target: str
    strategy: Strategy
    tp: int
    size: int
    rows: int = 8
    columns: int = 8
    dtype: str = "fp32"
    sp: bool = False
    threads: int = 1

    @property
    def ranks(self) -> int:
        return {"all-reduce": self.size, "gemm": 1}.get(self.target, self.tp)


@dataclass(frozen=True)
class Order:
    """One tree, and the places where it was found."""

    tree: Tree
    places: str


def title(setting: Setting) -> str:
    """The setting in one line."""
    sp = ", sequence-parallel" if setting.sp or setting.target == "norm" else ""
    what = TARGETS[setting.target]
    return f"{what}: {setting.size} summands, {setting.strategy}, {setting.dtype}{sp}"

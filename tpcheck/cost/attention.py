"""What attention moves through a GPU's memory and keeps for backward: unfused, and by blocks of keys.

    unfused      Megatron's own: every operation on scores reads and writes them, [heads, s, s] of each sequence
    blockwise    the patches' own: operands and results of forward, of backward and of the sum over a group's heads,
                 each once; keys and values that programs read again come from the cache where it holds them

Of a bfloat16 step, per rank. What operations on scores are, `tests/cost/test_attention.py` counts on real ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tpcheck.config.schema import RunConfig
from tpcheck.cost.terms import evaluate, symbols

__all__ = ["KERNELS", "AttentionTerm", "Kernel", "Quantity", "attention_terms"]

Kernel = Literal["unfused", "blockwise"]
Quantity = Literal["moved", "saved"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


@dataclass(frozen=True)
class AttentionTerm:
    """One line of the account, in bytes: moved in a step, or saved for backward when all layers have run forward."""

    quantity: Quantity
    what: str
    kernel: Kernel
    formula: str
    value: float


def attention_terms(config: RunConfig) -> list[AttentionTerm]:
    """All terms of one step of `config`, which must be bf16 (of other dtypes Megatron's operations are others), and
    whose sequences must be whole: of chunks, keys are read once for each."""
    if config.dtype != "bf16" or config.chunks > 1:
        return []
    known = symbols(config)
    grouped = config.model.num_query_groups != config.model.num_attention_heads
    lines: list[tuple[Quantity, str, Kernel, str]] = [
        ("moved", "forward: operations on scores", "unfused", "34·n·r·L·T·s·q/d/t"),
        ("moved", "backward: operations on scores", "unfused", "40·n·L·T·s·q/d/t"),
        ("moved", "forward: q, k, v, output, two numbers a row", "blockwise", "n·r·L·T·((2·q+2·k)·e+8·q/d)/t"),
        ("moved", "backward: the same, gradients", "blockwise", "n·L·T·((4·q+2·k)·e+8·q+8·q/d)/t"),
        ("moved", "backward: heads' dk and dv, their sums", "blockwise", "n·L·T·(8·q+2·k·e)/t"),
        ("saved", "softmax, in float32 and bf16", "unfused", "6·L·T·s·q/d/t"),
    ]
    if grouped:
        lines.append(("saved", "keys and values repeated for their heads", "unfused", "2·L·T·q·e/t"))
    lines.append(("saved", "output, two numbers a row", "blockwise", "L·T·(q·e+8·q/d)/t"))
    if config.recompute:  # of one layer at a time
        lines = [(quantity, what, kernel, f.replace("L·T", "T") if quantity == "saved" else f)
                 for quantity, what, kernel, f in lines]  # fmt: skip
    return [AttentionTerm(*line, evaluate(line[-1], known)) for line in lines]

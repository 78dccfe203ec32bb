"""What attention multiplies, moves through a GPU's memory, keeps for backward and holds at once: by either kernel.

    unfused      Megatron's own: every operation on scores reads and writes them, [heads, s, s] of each sequence
    blockwise    the patches' own: operands and results of forward, of backward and of the sum over a group's heads,
                 each once; keys and values that programs read again come from the cache where it holds them

The latter walks the blocks that a causal mask leaves, 128 rows of queries or 64 of keys by as many keys or queries;
Σp is 16 more columns of p·v. Its dq and its dk, dv both compute scores and dp: 7 products in backward, not 5.

Of a bfloat16 step, per rank; FLOPs of sequences of whole blocks of 128. What operations on scores are,
`tests/cost/test_attention.py` counts on real ones, and `tests/patches/kernels/test_attention_costs.py` what the
kernels multiply and hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tpcheck.config.schema import RunConfig
from tpcheck.cost.formulas import evaluate
from tpcheck.cost.terms import symbols

__all__ = ["KERNELS", "AttentionTerm", "Kernel", "Quantity", "attention_terms"]

Kernel = Literal["unfused", "blockwise"]
Quantity = Literal["flops", "moved", "saved", "peak"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


@dataclass(frozen=True)
class AttentionTerm:
    """One line of the account: FLOPs or bytes moved of a step; bytes saved for backward when all layers have run
    forward; bytes that are held at once for one layer, in forward with what it saves, in backward beside that."""

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
        ("flops", "forward: scores, p·v", "unfused", "4·n·r·L·T·s·q/t"),
        ("flops", "backward: dp, dq, dk, dv", "unfused", "8·n·L·T·s·q/t"),
        ("flops", "forward: scores, p·v, Σp", "blockwise", "n·r·L·T·(s+128)·(2·P+16·q/d)/t"),
        ("flops", "backward: scores, dp, dq", "blockwise", "3·n·L·T·(s+128)·P/t"),
        ("flops", "backward: scores, dp, dk, dv", "blockwise", "4·n·L·T·(s+64)·P/t"),
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
    repeated = "+2·T·q·e/t" * grouped
    lines += [
        ("peak", "forward: scores, twice in float32", "unfused", f"12·T·s·q/d/t+s·s{repeated}"),
        ("peak", "backward: gradients of scores", "unfused", "8·T·s·q/d/t+T·q·e/t"),
        ("peak", "forward: output, two numbers a row", "blockwise", "T·(q·e+8·q/d)/t"),
        ("peak", "backward: gradients, of every head", "blockwise", "T·((e+8)·q+(4·l+4·i+2)·k)/t"),
    ]
    if config.recompute:  # of one layer at a time
        lines = [(quantity, what, kernel, f.replace("L·T", "T") if quantity == "saved" else f)
                 for quantity, what, kernel, f in lines]  # fmt: skip
    return [AttentionTerm(*line, evaluate(line[-1], known)) for line in lines]

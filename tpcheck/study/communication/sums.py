"""One row-parallel sum, added over ranks in bfloat16, in float32, or by the tree: bytes and errors.

Errors are against the float64 product, rounded to bfloat16 or not; none can be below one rounding's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcheck.study.communication.settings import SIZES, Communication
from tpcheck.study.megatron import begin, drawn, layer, layer_config, share
from tpcheck.study.ranks import on_ranks
from tpcheck.study.study import Progress

__all__ = ["sums"]

# Bytes that a rank sends per element of the result, over (t-1)/t.
SENT = {"bfloat16": 2 * 2, "float32": 2 * 4, "tree": 4 + 2}


def sums(settings: Communication, progress: Progress) -> dict[str, Any]:
    """Of fc2's shape, by TP size and by how ranks add: relative error, bytes, and whether bits are TP=1's."""
    rows: list[dict[str, Any]] = []
    first: dict[str, Tensor] = {}
    for number, tp in enumerate(SIZES):
        progress(number / len(SIZES), f"TP={tp}")
        for how in SENT:
            y, exact = on_ranks(tp, _added, how, settings.seq_length, settings.hidden)[0]
            first.setdefault(how, y)
            rows.append({
                "tp": tp, "how": how, "relative": float((y.double() - exact).norm() / exact.norm()),
                "sent_per_element": SENT[how] * (tp - 1) / tp, "differing": int((y != first[how]).sum()),
                "size": y.numel(),
            })  # fmt: skip
    return {"rows": rows, "rounding": float((exact.bfloat16().double() - exact).norm() / exact.norm())}


def _added(how: str, tokens: int, hidden: int) -> tuple[Tensor, Tensor]:
    begin("tree" if how == "tree" else "stock")
    inner = 4 * hidden
    weight_NK = drawn(hidden, inner, seed=1, dtype=torch.bfloat16, scale=inner**-0.5)
    x_TK = drawn(tokens, 1, inner, seed=2, dtype=torch.bfloat16)
    exact = x_TK.double() @ weight_NK.double().t()
    mine = share(x_TK, -1)
    if how == "float32":
        partial = mine.float() @ share(weight_NK, 1).float().t()
        dist.all_reduce(partial)
        return partial.bfloat16(), exact
    with torch.no_grad():
        y, _ = layer("row", layer_config("bf16", hidden), weight_NK)(mine)
    return y, exact

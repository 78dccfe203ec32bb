"""Column- and row-parallel pairs on top of each other, without anything between them: how the error grows.

    h ── column [F, H] ── row [H, F] ── h ── column ── row ── …        forward, and back with a gradient from above

`tf32` is a simulation, forward alone: float32 whose operands are rounded to the 10 bits that tensor cores read of
them where float32 products are allowed to be TF32, partial sums added rank by rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcheck.config.strategies import Strategy
from tpcheck.run.dtypes import DTYPES
from tpcheck.study.megatron import begin, drawn, layer, layer_config
from tpcheck.study.ranks import on_ranks
from tpcheck.study.study import Progress
from tpcheck.study.tensors import apart
from tpcheck.study.tp_vs_dp.settings import TpVsDp

__all__ = ["stack"]

TP = 4
TF32_BITS = 10


def stack(settings: TpVsDp, progress: Progress) -> dict[str, Any]:
    """Of every pair, bottom up, its output and that output's gradient at TP=4 against TP=1."""
    cases: list[tuple[str, Strategy]] = [(dtype, strategy) for dtype in DTYPES for strategy in ("stock", "tree")]
    found: dict[str, Any] = {}
    for place, (dtype, strategy) in enumerate(cases):
        progress(place / (len(cases) + 1), f"{dtype}, {strategy}")
        one, four = (on_ranks(tp, _pass, dtype, strategy, settings)[0] for tp in (1, TP))
        found[f"{strategy} {dtype}"] = [
            {"out": apart(*outputs), "dout": apart(*gradients)}
            for outputs, gradients in zip(
                zip(one[0], four[0], strict=True), zip(one[1], four[1], strict=True), strict=True
            )
        ]
    progress(len(cases) / (len(cases) + 1), "TF32, simulated")
    found["simulated tf32"] = [
        {"out": apart(*pair)} for pair in zip(*(_tf32(settings, tp) for tp in (1, TP)), strict=True)
    ]
    return found


def _weights(settings: TpVsDp, number: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    up = drawn(settings.ffn, settings.hidden, seed=1000 + number, dtype=dtype, scale=settings.hidden**-0.5)
    down = drawn(settings.hidden, settings.ffn, seed=2000 + number, dtype=dtype, scale=settings.ffn**-0.5)
    return up, down


def _pass(dtype: str, strategy: Strategy, settings: TpVsDp) -> tuple[list[Tensor], list[Tensor]]:
    """Every pair's output, and its gradient: the same on all ranks."""
    begin(strategy)
    config = layer_config(dtype, settings.hidden)
    h = drawn(settings.stacked_tokens, 1, settings.hidden, seed=2, dtype=DTYPES[dtype]).requires_grad_()
    outputs = []
    for number in range(settings.stacked):
        up, down = _weights(settings, number, DTYPES[dtype])
        h = layer("row", config, down)(layer("column", config, up)(h)[0])[0]
        h.retain_grad()
        outputs.append(h)
    h.backward(drawn(*h.shape, seed=3, dtype=DTYPES[dtype]))
    return [out.detach() for out in outputs], [_gradient(out) for out in outputs]


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _tf32(settings: TpVsDp, tp: int) -> list[Tensor]:
    h = drawn(settings.stacked_tokens, settings.hidden, seed=2, dtype=torch.float32)
    outputs = []
    for number in range(settings.stacked):
        up, down = (_rounded(weight) for weight in _weights(settings, number, torch.float32))
        inner = torch.cat([_rounded(h) @ part.t() for part in up.chunk(tp)], -1)
        parts = [a @ b.t() for a, b in zip(_rounded(inner).chunk(tp, -1), down.chunk(tp, -1), strict=True)]
        h = parts[0]
        for part in parts[1:]:
            h = h + part
        outputs.append(h)
    return outputs


def _rounded(tensor: Tensor) -> Tensor:
    """To `TF32_BITS` explicit bits of the significand, to nearest, ties away from zero."""
    dropped = 23 - TF32_BITS
    return ((tensor.view(torch.int32) + (1 << (dropped - 1))) & -(1 << dropped)).view(torch.float32)

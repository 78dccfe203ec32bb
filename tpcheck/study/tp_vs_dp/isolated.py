"""Column- and row-parallel layers in isolation, and the product of one rank as TP narrows it.

tensor      column            row               what TP does to its sum
y  [T, N]   whole features    over ranks        row: partial sums are rounded, then added
dx [T, K]   over ranks        whole features    column: likewise
dw [N, K]   over tokens       over tokens       nothing
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tpcheck.config.strategies import Strategy
from tpcheck.run.dtypes import DTYPES
from tpcheck.study.megatron import Kind, begin, drawn, layer, layer_config, share
from tpcheck.study.ranks import on_ranks
from tpcheck.study.study import Progress
from tpcheck.study.tensors import apart
from tpcheck.study.tp_vs_dp.settings import SIZES, TpVsDp

__all__ = ["columns", "isolated"]

TOKENS, WIDTHS, FEATURES = (1, 16, 64, 512), (8, 48, 360, 896, 1024, 4096), 1024  # shapes that a library may tell apart
# Along the features in and out: where each tensor of a layer is cut.
SPREAD: dict[Kind, dict[str, int | None]] = {
    "column": {"y": -1, "dx": None, "dw": 0},
    "row": {"y": None, "dx": -1, "dw": 1},
}


def isolated(dtype: str, settings: TpVsDp, progress: Progress) -> dict[str, Any]:
    """Every tensor of a layer at TP=2, 4, 8 against TP=1."""
    cases: list[tuple[Kind, Strategy]] = [("row", "stock"), ("column", "stock"), ("row", "tree"), ("column", "tree")]
    rows = []
    for place, (kind, strategy) in enumerate(cases):
        whole: dict[int, dict[str, Tensor]] = {}
        for number, tp in enumerate(SIZES):
            progress((place + number / len(SIZES)) / len(cases), f"{kind}-parallel, {strategy}, TP={tp}")
            whole[tp] = _whole(kind, on_ranks(tp, _pass, kind, dtype, strategy, settings))
        for tp in SIZES[1:]:
            rows += [{"kind": kind, "dtype": dtype, "strategy": strategy, "tp": tp, "tensor": name,
                      **apart(whole[1][name], whole[tp][name])} for name in whole[1]]  # fmt: skip
    return {"layers": rows}


def _pass(kind: Kind, dtype: str, strategy: Strategy, settings: TpVsDp) -> dict[str, Tensor]:
    """This rank's part of output and gradients of one forward and backward pass."""
    begin(strategy)
    features = (settings.hidden, settings.ffn) if kind == "column" else (settings.ffn, settings.hidden)
    inner, outer = features
    weight_NK = drawn(outer, inner, seed=1, dtype=DTYPES[dtype], scale=inner**-0.5)
    x_TK = drawn(settings.tokens, 1, inner, seed=2, dtype=DTYPES[dtype])
    dy_TN = drawn(settings.tokens, 1, outer, seed=3, dtype=DTYPES[dtype])
    module = layer(kind, layer_config(dtype, settings.hidden), weight_NK)
    x = (x_TK if kind == "column" else share(x_TK, -1)).requires_grad_()
    y, _ = module(x)
    y.backward(share(dy_TN, -1) if kind == "column" else dy_TN)
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dw": module.weight.grad}


def _whole(kind: Kind, ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    whole = {}
    for name, dim in SPREAD[kind].items():
        parts = [rank[name] for rank in ranks]
        if dim is None:
            assert all(torch.equal(parts[0], part) for part in parts), f"{name} is not the same on all ranks"
        whole[name] = parts[0] if dim is None else torch.cat(parts, dim)
    return whole


def columns(settings: TpVsDp, progress: Progress) -> dict[str, Any]:
    """What a rank of a column-parallel layer computes, against the same columns of the whole product, on one thread."""
    torch.set_num_threads(1)
    rows = []
    for dtype, width, tokens in itertools.product(DTYPES, WIDTHS, TOKENS):
        weight_NK = drawn(width, FEATURES, seed=1, dtype=DTYPES[dtype], scale=FEATURES**-0.5)
        x_TK = drawn(tokens, FEATURES, seed=2, dtype=DTYPES[dtype])
        y_TN = x_TK @ weight_NK.t()
        for tp in SIZES[1:]:
            found = apart(y_TN, torch.cat([x_TK @ part.t() for part in weight_NK.chunk(tp)], -1))
            kept = {key: found[key] for key in ("size", "differing", "max_abs")}
            rows.append({"dtype": dtype, "width": width, "tokens": tokens, "tp": tp, **kept})
    return {"products": rows}

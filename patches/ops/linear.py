"""Row- and column-parallel linear layers whose forward and backward have the same bits at every TP size.

    row     y_TN  = Σ_r x_TtK · w_NtKᵀ      K spread over ranks: sharded sum; dgrad, wgrad local
    column  y_TtN = x_TK · w_tNKᵀ           dgrad dy_TtN · w_tNK: sharded sum over N; forward, wgrad local

Local products are single leaves; wgrad is one a batch leaf where sums over the batch have no order. Under sequence
parallelism (SP) x or y is spread over tokens, dimension 0; where one rank holds all, nothing is gathered or scattered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patches.ops.bias import bias_per_token
from patches.ops.sequences import added, batch_leaves, batch_sum
from patches.ops.sharded import Shards
from patches.order.collectives import all_gather, begin_all_gather
from patches.order.products import add_product, product

__all__ = ["GradSink", "column_parallel", "row_parallel"]


@dataclass(frozen=True)
class GradSink:
    """Where a weight's gradient goes, unless sums over the batch have no order: then it is the weight's `BatchSum`.

    Args:
        main_grad: into `weight.main_grad` in float32 (gradient accumulation fusion), instead of to autograd.
        overwrite: replace what is in `main_grad` instead of adding to it.
    """

    main_grad: bool = False
    overwrite: bool = False


def row_parallel(x: Tensor, weight: Tensor, shards: Shards, sp: bool, sink: GradSink) -> Tensor:
    """y = x·weightᵀ, K spread over ranks.

    Args:
        x: [s, b, tK].
        weight: [N, tK].
        sp: y is [s/t, b, N] instead of [s, b, N].
    """
    result: Tensor = _RowParallel.apply(x, weight, shards, sp, sink)
    return result


def column_parallel(
    x: Tensor, weight: Tensor, bias: Tensor | None, shards: Shards, sp: bool, sink: GradSink, pieces: int = 1
) -> Tensor:
    """y = x·weightᵀ + bias, N spread over ranks: [s, b, tN].

    Args:
        x: [s, b, K], or [s/t, b, K] under `sp`.
        weight: [tN, K].
        pieces: 2 where weight holds [gate_r | up_r] of a gated layer.
    """
    y: Tensor = _ColumnParallel.apply(x, weight, shards, sp, sink, pieces)
    if bias is None:
        return y
    return y + (bias_per_token(bias, y.shape, shards.one_leaf()) if shards.contract.order_free else bias)


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shards: Shards, sp: bool, sink: GradSink) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.shards, ctx.sp, ctx.sink = weight, shards, sp, sink
        y_TN = shards.product(x.flatten(0, -2), weight.t(), x.dtype, scatter=sp)
        return _unflattened(y_TN, (-1, *x.shape[1:-1], y_TN.shape[1]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        if ctx.sp:
            dy = all_gather(dy, ctx.shards.group)
        dy_TN = dy.flatten(0, -2)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(dy_TN, weight, dtype=x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(ctx.weight, dy, x, ctx.sink, ctx.shards)
        return dx, dw, None, None, None


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shards: Shards, sp: bool, sink: GradSink, pieces: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.shards, ctx.sp, ctx.sink, ctx.pieces = weight, shards, sp, sink, pieces
        if sp:
            x = all_gather(x, shards.group)
        y_TN = product(x.flatten(0, -2), weight.t(), dtype=x.dtype)
        return _unflattened(y_TN, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        dy_TN = dy.flatten(0, -2)
        # x travels while dgrad's own leaves are multiplied, dgrad's roots while wgrad is.
        if ctx.needs_input_grad[1]:
            gathered = begin_all_gather(x, ctx.shards.group if ctx.sp else None)
        if ctx.needs_input_grad[0]:
            dgrad = ctx.shards.begin_product(
                dy_TN, weight, x.dtype, ctx.pieces, ctx.sp, beside_collective=ctx.sp and ctx.needs_input_grad[1]
            )
        dx = dw = None
        if ctx.needs_input_grad[1]:
            travels = ctx.needs_input_grad[0] and ctx.shards.size > 1
            dw = _weight_gradient(ctx.weight, dy, gathered.wait(), ctx.sink, ctx.shards, beside_collective=travels)
        if ctx.needs_input_grad[0]:
            dx = dgrad.wait().view(x.shape)
        return dx, dw, None, None, None, None


def _unflattened(y_TN: Tensor, shape: Sequence[int]) -> Tensor:
    """`y_TN` in another shape, not as a view: callers may write into a layer's output."""
    return torch.ops.aten._unsafe_view(y_TN, shape)


def _weight_gradient(
    weight: Any, dy: Tensor, x: Tensor, sink: GradSink, shards: Shards, beside_collective: bool = False
) -> Tensor | None:
    """dyᵀ·x in the weight's dtype, or put into `weight.main_grad`, with the placeholder Megatron's hooks expect."""
    if shards.contract.order_free:
        leaves = zip(batch_leaves(dy, shards.chunks), batch_leaves(x, shards.chunks), strict=True)
        total = batch_sum(weight)
        for dy_sN, x_sK in leaves:
            total.add_product(dy_sN.t(), x_sK, beside_collective)
        return added(weight)
    dy_TN, x_TK = dy.flatten(0, -2), x.flatten(0, -2)
    if not sink.main_grad:
        return product(dy_TN.t(), x_TK, dtype=weight.dtype, beside_collective=beside_collective)
    if sink.overwrite:
        weight.main_grad.zero_()
    add_product(weight.main_grad, dy_TN.t(), x_TK, beside_collective)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight)

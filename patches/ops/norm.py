"""RMSNorm and LayerNorm: rows are normalised one by one, parameter gradients are sums in the contract's order.

    y = x̂ · gamma (+ beta)      dgamma = Σ dy·x̂      dbeta = Σ dy

The sum's leaves lie along tokens or heads. Where sums over the batch have no order, every batch leaf has its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.ops.leaf_sums import HEADS, TOKENS, begin_gamma_gradients, begin_leaf_sums
from patches.ops.sequences import add_leaves
from patches.ops.sharded import Shards
from patches.order.backend import backend
from patches.order.handle import AsyncResult
from patches.order.x_hat import x_hat

__all__ = ["HEADS", "TOKENS", "norm"]


def norm(
    x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, centered: bool, leaf_dim: int, shards: Shards,
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Normalise `x` over its last dimension.

    Args:
        x: [s, b, h] or [s, b, heads, d].
        gamma, beta: [h] or [d]; beta None without bias.
        centered: subtract the mean (LayerNorm) or not (RMSNorm).
        leaf_dim: TOKENS or HEADS, the dimension of `x` whose leaves order the parameter gradients.
        shards: how that dimension is spread over ranks.
        weight: the parameter that gamma is one more than, where gamma is none itself.
    """
    y: Tensor = _Norm.apply(x, gamma, beta, eps, centered, leaf_dim, shards, gamma if weight is None else weight)
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, centered: bool, leaf_dim: int,
        shards: Shards, weight: Tensor,
    ) -> Tensor:  # fmt: skip
        y, mean, rstd = backend(x.device).normalised(x, gamma, beta, eps, centered)
        ctx.save_for_backward(x, gamma, mean, rstd)
        ctx.beta, ctx.weight, ctx.leaf_dim, ctx.shards = beta, weight, leaf_dim, shards
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, gamma, mean, rstd = ctx.saved_tensors
        dx = dgamma = dbeta = None
        free = ctx.shards.contract.order_free
        whole = tuple(d for d in range(x.dim() - 1) if d != ctx.leaf_dim)
        # Roots travel while dx is computed.
        if ctx.needs_input_grad[1]:
            dgamma = _begin_gamma_gradient(dy, x, mean, rstd, gamma.dtype, ctx.leaf_dim, whole, ctx.shards)
        if ctx.beta is not None and ctx.needs_input_grad[2]:
            dbeta = (
                begin_leaf_sums(dy, ctx.leaf_dim, ctx.shards)
                if free
                else ctx.shards.begin_sum_over(dy, ctx.leaf_dim, gamma.dtype, whole)
            )
        if ctx.needs_input_grad[0]:
            dx = backend(x.device).input_gradient(dy, x, gamma, mean, rstd)
        of_gamma, of_beta = (
            found and (add_leaves(parameter, found.wait()) if free else found.wait())
            for found, parameter in ((dgamma, ctx.weight), (dbeta, ctx.beta))
        )
        return dx, of_gamma, of_beta, None, None, None, None, None


def _begin_gamma_gradient(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, dtype: torch.dtype, leaf_dim: int,
    whole: tuple[int, ...], shards: Shards,
) -> AsyncResult:  # fmt: skip
    """Σ dy·x̂, of every batch leaf where sums over the batch have no order."""
    free = shards.contract.order_free
    if shards.contract.strategy == "gather":
        summands = dy.float() * x_hat(x, mean, rstd)
        if free:
            return begin_leaf_sums(summands, leaf_dim, shards)
        return shards.begin_sum_over(summands, leaf_dim, dtype, whole)
    if free:
        return begin_gamma_gradients(dy, x, mean, rstd, leaf_dim, shards)
    tree = backend(x.device).tree_of_gamma_gradients
    return shards.begin_reduce_root(tree(dy, x, mean, rstd, leaf_dim, shards.leaves, whole), dtype)

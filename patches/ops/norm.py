"""RMSNorm and LayerNorm: rows are normalised one by one, parameter gradients are sums in the contract's order.

    y = x̂ · gamma (+ beta)      dgamma = Σ dy·x̂      dbeta = Σ dy

The sum's leaves lie along tokens (dimension 0 of [s, b, h]) or heads (dimension 2 of [s, b, heads, d]).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.ops.sharded import Shards
from patches.order.exact import exact_sum, rounded

__all__ = ["norm"]


def norm(
    x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, centered: bool, leaf_dim: int, shards: Shards
) -> Tensor:
    """Normalise `x` over its last dimension.

    Args:
        x: [s, b, h] or [s, b, heads, d].
        gamma, beta: [h] or [d]; beta None without bias.
        centered: subtract the mean (LayerNorm) or not (RMSNorm).
        leaf_dim: dimension of `x` whose leaves order the parameter gradients.
        shards: how that dimension is spread over ranks.
    """
    y: Tensor = _Norm.apply(x, gamma, beta, eps, centered, leaf_dim, shards)
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, centered: bool, leaf_dim: int,
        shards: Shards,
    ) -> Tensor:  # fmt: skip
        mean = _row_mean(x) if centered else None
        rstd = 1.0 / torch.sqrt(_row_mean(_centered(x, mean).square()) + eps)
        ctx.save_for_backward(x, gamma, mean, rstd)
        ctx.has_beta, ctx.leaf_dim, ctx.shards = beta is not None, leaf_dim, shards
        y = _normalised(x, mean, rstd) * gamma.float()
        return rounded(y if beta is None else y + beta.float(), x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, gamma, mean, rstd = ctx.saved_tensors
        x_hat, dy32 = _normalised(x, mean, rstd), dy.float()
        dx = dgamma = dbeta = None
        if ctx.needs_input_grad[0]:
            g = (dy32 * gamma.float()).double()
            dx = g - x_hat * _row_mean(g * x_hat)
            if mean is not None:
                dx = dx - _row_mean(g)
            dx = rounded(dx * rstd, x.dtype)
        whole = tuple(d for d in range(x.dim() - 1) if d != ctx.leaf_dim)
        if ctx.needs_input_grad[1]:
            dgamma = ctx.shards.total(dy32 * x_hat, ctx.leaf_dim, gamma.dtype, whole)
        if ctx.has_beta and ctx.needs_input_grad[2]:
            dbeta = ctx.shards.total(dy32, ctx.leaf_dim, gamma.dtype, whole)
        return dx, dgamma, dbeta, None, None, None, None


def _row_mean(x: Tensor) -> Tensor:
    return exact_sum(x, -1, keepdim=True) / x.shape[-1]


def _normalised(x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    return (_centered(x, mean) * rstd).float()


def _centered(x: Tensor, mean: Tensor | None) -> Tensor:
    return x.double() if mean is None else x.double() - mean

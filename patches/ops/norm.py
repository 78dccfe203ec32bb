"""RMSNorm and LayerNorm: rows are normalised one by one, parameter gradients are sums in the contract's order.

    y = x̂ · gamma (+ beta)      dgamma = Σ dy·x̂      dbeta = Σ dy

The sum's leaves lie along tokens (dimension 0 of [s, b, h]) or heads (dimension 2 of [s, b, heads, d]).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.ops.sharded import Shards
from patches.order.exact import norm as norm_on_cpu
from patches.order.kernels import provenance

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
        y, mean, rstd = _rows(x).normalised(x, gamma, beta, eps, centered)
        ctx.save_for_backward(x, gamma, mean, rstd)
        ctx.has_beta, ctx.leaf_dim, ctx.shards = beta is not None, leaf_dim, shards
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, gamma, mean, rstd = ctx.saved_tensors
        dx = dgamma = dbeta = None
        if ctx.needs_input_grad[0]:
            dx = _rows(x).input_gradient(dy, x, gamma, mean, rstd)
        whole = tuple(d for d in range(x.dim() - 1) if d != ctx.leaf_dim)
        if ctx.needs_input_grad[1]:
            dgamma = _gamma_gradient(dy, x, mean, rstd, gamma.dtype, ctx.leaf_dim, whole, ctx.shards)
        if ctx.has_beta and ctx.needs_input_grad[2]:
            dbeta = ctx.shards.total(dy, ctx.leaf_dim, gamma.dtype, whole)
        return dx, dgamma, dbeta, None, None, None, None


def _gamma_gradient(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, dtype: torch.dtype, leaf_dim: int,
    whole: tuple[int, ...], shards: Shards,
) -> Tensor:  # fmt: skip
    """Σ dy·x̂; kernels of the tree multiply as they sum."""
    if provenance.serve(x.device) and shards.contract.strategy == "tree":
        from patches.order.kernels import sums

        leaves = shards.contract.leaves_of_rank(shards.size)
        return shards.meet(sums.tree_of_sums(dy, leaf_dim, leaves, whole, (x, mean, rstd)), dtype)
    return shards.total(dy.float() * norm_on_cpu.x_hat(x, mean, rstd), leaf_dim, dtype, whole)


def _rows(x: Tensor) -> Any:
    """What normalises rows where `x` lies."""
    if not provenance.serve(x.device):
        return norm_on_cpu
    from patches.order.kernels import norm

    return norm

"""RMSNorm and LayerNorm of rows on a CPU: exact sums, float64 arithmetic; `norm_gpu` has the same functions."""

from __future__ import annotations

import torch
from torch import Tensor

from patches.order.exact import exact_sum, rounded

__all__ = ["input_gradient", "normalised", "x_hat"]


def normalised(
    x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y in the dtype of `x`, and each row's mean (None unless `centered`) and rstd, [.., 1]."""
    mean = _row_mean(x) if centered else None
    rstd = 1.0 / torch.sqrt(_row_mean(_centered(x, mean).square()) + eps)
    y = x_hat(x, mean, rstd) * gamma.float()
    return rounded(y if beta is None else y + beta.float(), x.dtype), mean, rstd


def input_gradient(dy: Tensor, x: Tensor, gamma: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """dx in the dtype of `x`."""
    hat, g = x_hat(x, mean, rstd), (dy.float() * gamma.float()).double()
    dx = g - hat * _row_mean(g * hat)
    if mean is not None:
        dx = dx - _row_mean(g)
    return rounded(dx * rstd, x.dtype)


def x_hat(x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """(x - mean)·rstd, float32."""
    return (_centered(x, mean) * rstd).float()


def _row_mean(x: Tensor) -> Tensor:
    return exact_sum(x, -1, keepdim=True) / x.shape[-1]


def _centered(x: Tensor, mean: Tensor | None) -> Tensor:
    return x.double() if mean is None else x.double() - mean

"""RMSNorm and LayerNorm of rows on a CPU: exact sums, float64 arithmetic; `norm_gpu` has the same functions."""

from __future__ import annotations

import torch
from torch import Tensor

from patches.order.exact.products import rounded, sum_bounds
from patches.order.exact.slices import sliced_sum

__all__ = ["input_gradient", "normalised", "x_hat"]


def normalised(
    x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y in the dtype of `x`, and each row's mean (None unless `centered`) and rstd, [.., 1]."""
    mean = _row_mean(x.to(torch.float64, copy=True)) if centered else None
    wide = _centered(x, mean)
    rstd = 1.0 / torch.sqrt(_row_mean(wide.square()) + eps)
    y = (wide * rstd).float() * gamma.float()
    return rounded(y if beta is None else y + beta.float(), x.dtype), mean, rstd


def input_gradient(dy: Tensor, x: Tensor, gamma: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """dx in the dtype of `x`."""
    hat, g = x_hat(x, mean, rstd), (dy.float() * gamma.float()).double()
    of_g = None if mean is None else _row_mean(g.clone())

    def dx(of_products: Tensor) -> Tensor:
        centered = g - hat * of_products
        return (centered if of_g is None else centered - of_g) * rstd

    products = g * hat
    if products.numel():
        # dx follows the mean in one direction: where both its bounds give the same number, so does the mean.
        ends = sum_bounds(products, [x.dim() - 1], keepdim=True)
        low, high = (dx(end / x.shape[-1]).to(x.dtype).add_(0.0) for end in ends)
        if torch.equal(low, high):
            return low
    return rounded(dx(_row_mean(products)), x.dtype)


def x_hat(x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """(x - mean)·rstd, float32."""
    return (_centered(x, mean) * rstd).float()


def _row_mean(x: Tensor) -> Tensor:
    """Mean over the last dimension of float64 `x`, which it consumes."""
    return sliced_sum(x).div_(x.shape[-1]).unsqueeze(-1)


def _centered(x: Tensor, mean: Tensor | None) -> Tensor:
    return x.double() if mean is None else x.double() - mean

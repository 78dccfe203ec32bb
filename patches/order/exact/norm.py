"""RMSNorm and LayerNorm of rows: exact sums, float64 arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from patches.order.exact.brackets import SHORT, UNIT, least_power
from patches.order.exact.slices import rounded, sliced_sum
from patches.order.exact.sums import sum_bounds, tree_of_sums
from patches.order.x_hat import minus_mean, x_hat

__all__ = ["input_gradient", "normalised", "tree_of_gamma_gradients"]


def normalised(
    x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y in the dtype of `x`, and each row's mean (None unless `centered`) and rstd, float64 [.., 1]."""
    mean = _row_mean(x.to(torch.float64, copy=True)) if centered else None
    wide = minus_mean(x, mean)
    squares = wide * wide
    exact = _exact_mean(squares, x) if mean is None and x.dtype in SHORT else None
    rstd = 1.0 / torch.sqrt((_row_mean(squares) if exact is None else exact) + eps)
    y = (wide * rstd).float() * gamma.float()
    return rounded(y if beta is None else y + beta.float(), x.dtype), mean, rstd


def input_gradient(dy: Tensor, x: Tensor, gamma: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """dx in the dtype of `x`."""
    hat, g = x_hat(x, mean, rstd).double(), (dy.float() * gamma.float()).double()
    of_g = None if mean is None else _row_mean(g.clone())

    def dx(of_products: Tensor) -> Tensor:
        across = g - hat * of_products
        return (across if of_g is None else across - of_g) * rstd

    products = g * hat
    if products.numel():
        # dx follows the mean in one direction: where both its bounds give the same number, so does the mean.
        ends = sum_bounds(products, [x.dim() - 1], keepdim=True)
        low, high = (dx(end / x.shape[-1]).to(x.dtype).add_(0.0) for end in ends)
        if torch.equal(low, high):
            return low
    return rounded(dx(_row_mean(products)), x.dtype)


def tree_of_gamma_gradients(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, dim: int, leaves: int, exact_dims: tuple[int, ...]
) -> Tensor:
    """float32 root of `tree_of_sums` of dy·x̂."""
    return tree_of_sums(dy.float() * x_hat(x, mean, rstd), dim, leaves, exact_dims)


def _exact_mean(squares: Tensor, x: Tensor) -> Tensor | None:
    """`_row_mean` of the squares of `x`, dtype in SHORT, where no addition can round; None where one might."""
    total = squares.sum(-1)
    least = least_power(x).double()
    units = total / (least * least)  # the last digit of a square is 4^-digits of one
    if not units.numel() or not float(units.amax()) < 0.99 / UNIT / 4.0 ** SHORT[x.dtype][0]:
        return None
    return total.div_(x.shape[-1]).unsqueeze(-1)


def _row_mean(x: Tensor) -> Tensor:
    """Mean over the last dimension of float64 `x`, which it consumes."""
    return sliced_sum(x).div_(x.shape[-1]).unsqueeze(-1)

"""Softmax and its logarithm: exponentials by ATen, their sums exact."""

from __future__ import annotations

import torch
from torch import Tensor

from patches.order.exact.sums import rounded_sum

__all__ = ["softmax", "softmax_gradient"]


def softmax(x: Tensor, dim: int, dtype: torch.dtype, log: bool = False) -> Tensor:
    """Softmax of `x` along `dim`, or its logarithm, in `dtype`."""
    shifted = x.float() - x.float().amax(dim, keepdim=True)
    weights = torch.exp(shifted)
    total = rounded_sum(weights, dim, keepdim=True)
    return (shifted - torch.log(total) if log else weights / total).to(dtype)


def softmax_gradient(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype, log: bool = False) -> Tensor:
    """The gradient that `dy` gives the input of `y = softmax(…)`, or of its logarithm, in `dtype`."""
    if log:
        return (dy.float() - torch.exp(y.float()) * rounded_sum(dy, dim, keepdim=True)).to(dtype)
    weighted = dy.float() * y.float()
    return (weighted - y.float() * rounded_sum(weighted, dim, keepdim=True)).to(dtype)

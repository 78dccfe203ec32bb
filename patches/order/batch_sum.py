"""Sums over the sequences of a global batch, in no order.

    a sequence's contribution, float32 ──rounded──▶ q · 2^-30 ──q added──▶ int64 ──rounded once──▶ float32

Integers add exactly, so micro-batches, data-parallel ranks and pipeline stages may bring contributions as they like.
The grid is the same for all parameters, steps and layouts: there is no state that a checkpoint would have to hold.

int64 wraps around, so partial sums may overflow and only the total must fit. It does while Σ max|contribution|, which
each `BatchSum` keeps, is below LIMIT: then |total| is below 2^61 units, and of two copies of a parameter below 2^62.
Infinities and NaNs are never below it.

What the grid cuts off: up to 2^-31 per contribution. Divided by the batch's tokens, as gradients are at the end, this
is up to 2^-31 / (tokens of a sequence): below 2^-10 of Adam's usual epsilon of 1e-8 from 64 tokens on, and below 2^-16
of it from 4096 on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LIMIT", "UNIT", "BatchSum", "exceeds", "round_into"]

UNIT = 2.0**-30
LIMIT = 2.0**61 * UNIT
CHUNK = 1 << 18  # elements that are taken at once


@dataclass(frozen=True)
class BatchSum:
    """The sum of one parameter's gradient, as far as this rank has it.

    Args:
        total: int64 in the parameter's shape, in units of the grid.
        bound: Σ max|contribution|, a float64 scalar on the same device.
        foreign: whether a gradient has come that is not among the contributions, a boolean scalar.
    """

    total: Tensor
    bound: Tensor
    foreign: Tensor

    @classmethod
    def of(cls, total: Tensor) -> BatchSum:
        """An empty sum in `total`, which is zero."""
        none = torch.zeros((), dtype=torch.float64, device=total.device)
        return cls(total, none, none.bool())

    def reset(self) -> None:
        """Forget all but `total`, which is a part of a buffer."""
        self.bound.zero_()
        self.foreign.zero_()

    def add(self, x: Tensor) -> None:
        """Add a contribution: float32 in the parameter's shape."""
        self.bound.add_(_largest(x))
        for total, part in zip(self.total.view(-1).split(CHUNK), x.reshape(-1).split(CHUNK), strict=True):
            total.add_(_in_units(part))

    def add_rows(self, ids: Tensor, x: Tensor) -> None:
        """Add row i of `x` [T, H] to row `ids[i]`, each a contribution of its own; float32, bfloat16 or float16."""
        self.bound.add_(x.abs().amax(-1).double().sum())
        step = max(1, CHUNK // x.shape[-1])
        for some, part in zip(ids.split(step), x.split(step), strict=True):
            self.total.index_add_(0, some, _in_units(part))

    def refuse(self, gradient: Tensor) -> None:
        """Take note of a gradient that nobody added; zeros are none."""
        self.foreign.logical_or_(gradient.ne(0).any())


def exceeds(bounds: Tensor) -> Tensor:
    """Of which of the `bounds` of sums, those of all ranks added, the total may not be exact."""
    return ~(bounds < LIMIT)


def round_into(out: Tensor, total: Tensor) -> None:
    """Round flat int64 `total` to numbers in `out`, which may lie in the first part of the same memory."""
    for place, part in zip(out.split(CHUNK), total.split(CHUNK), strict=True):
        place.copy_(part.double().mul_(UNIT))


def _largest(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def _in_units(x: Tensor) -> Tensor:
    return x.double().mul_(1 / UNIT).round_().to(torch.int64)

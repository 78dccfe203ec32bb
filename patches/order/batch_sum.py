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

from patches.order.grid import CHUNK, LIMIT, UNIT, add_units, in_units
from patches.order.products import add_product_in_units

__all__ = ["BatchSum", "exceeds", "round_into"]


@dataclass
class BatchSum:
    """The sum of one parameter's gradient, as far as this rank has it.

    Args:
        total: int64 in the parameter's shape, in units of the grid.
        bound: Σ max|contribution|, a float64 scalar on the same device.
        foreign: whether a gradient has come that is not among the contributions, a boolean scalar.
        rounded: the sum is complete, and the memory of `total` holds what it was rounded to.
    """

    total: Tensor
    bound: Tensor
    foreign: Tensor
    rounded: bool = False

    @classmethod
    def of(cls, total: Tensor) -> BatchSum:
        """An empty sum in `total`, which is zero."""
        none = torch.zeros((), dtype=torch.float64, device=total.device)
        return cls(total, none, none.bool())

    def reset(self) -> None:
        """Forget all but `total`, which is a part of a buffer."""
        self.bound.zero_()
        self.foreign.zero_()
        self.rounded = False

    def add(self, x: Tensor) -> None:
        """Add a contribution: float32 in the parameter's shape."""
        add_units(self.total, self.bound, x)

    def add_product(self, a_MK: Tensor, b_KN: Tensor, beside_collective: bool = False) -> None:
        """Add a·b, of one leaf, in the shape of a parameter's matrix."""
        add_product_in_units(self.total, self.bound, a_MK, b_KN, beside_collective)

    def add_rows(self, ids: Tensor, x: Tensor) -> None:
        """Add row i of `x` [T, H] to row `ids[i]`, each a contribution of its own; float32, bfloat16 or float16."""
        self.bound.add_(x.abs().amax(-1).double().sum())
        step = max(1, CHUNK // x.shape[-1])
        for some, part in zip(ids.split(step), x.split(step), strict=True):
            self.total.index_add_(0, some, in_units(part))

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

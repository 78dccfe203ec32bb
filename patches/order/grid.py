"""The grid of sums over the batch: contributions as whole numbers of `UNIT`, whose sums have no order.

The largest absolute values of contributions are added up beside them: below LIMIT, no sum of them is out of int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CHUNK", "LIMIT", "UNIT", "add_units", "in_units"]

UNIT = 2.0**-30
LIMIT = 2.0**61 * UNIT
CHUNK = 1 << 18  # elements that are taken at once


def add_units(total: Tensor, bound: Tensor, x: Tensor) -> None:
    """Add a contribution to int64 `total`, in units, and its largest absolute value to `bound`.

    Args:
        total: contiguous, of as many elements as `x`.
        bound: a float64 scalar.
        x: float32.
    """
    bound.add_(_largest(x))
    for place, part in zip(total.view(-1).split(CHUNK), x.reshape(-1).split(CHUNK), strict=True):
        place.add_(in_units(part))


def in_units(x: Tensor) -> Tensor:
    """Whole units, halves to even, int64."""
    return x.double().mul_(1 / UNIT).round_().to(torch.int64)


def _largest(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)

"""`order.polynomials` in torch, of single multiplications and additions: the same bits in every element's place."""

from __future__ import annotations

import torch
from torch import Tensor

from patches.order.polynomials import EXP2, SHIFT, SMALLEST

__all__ = ["exp2"]


def exp2(x: Tensor) -> Tensor:
    """2^x of float32 up to 127; NaN of NaN and +∞."""
    x = x.clamp(min=SMALLEST)
    shifted = x + SHIFT
    f = x - (shifted - SHIFT)
    p = torch.full_like(f, EXP2[-1])
    for coefficient in (*reversed(EXP2[:-1]), 1.0):
        p.mul_(f).add_(coefficient)
    return p.mul_(shifted.view(torch.int32).bitwise_left_shift(23).add_(0x3F800000).view(torch.float32))

"""What rounding may do to an updated weight, beyond what a few nudged runs happen to show.

Adam divides a gradient by its own size: an element whose average gradient is near zero moves as far as any other,
up or down as rounding has it. Few elements turn round in any one run, but each may:

    variance of an update  =  Σ  P(sign of mᵢ is rounding's)  ·  (2 Δwᵢ)²,   and at least the largest such turn
"""

from __future__ import annotations

import numpy as np
import torch

from tpcheck.checkpoint.tiling import Array
from tpcheck.trace.compare.metrics import Distance

__all__ = ["sign_flip_distance"]

POSSIBLE = 1e-4  # probability from which on a turn is allowed for


def sign_flip_distance(before: Array, after: Array, average: Array, noise: float, of: Array) -> Distance:
    """How far the updates whose sign rounding may decide take `after` from itself, relative to `of`.

    Args:
        before, after: the weights on both sides of the update.
        average: what decided on its direction: Adam's first moment, or the gradient.
        noise: how far rounding may take `average`, relative in norm.
        of: the weights, or the update itself.
    """
    spread = noise * float(np.linalg.norm(average)) / max(average.size, 1) ** 0.5
    norm = float(np.linalg.norm(of))
    if not spread or not norm:
        return Distance(0.0, 0.0)
    odds = torch.special.erfc(torch.from_numpy(np.abs(average) / spread / 2**0.5)).numpy() / 2
    squares = (2 * (after - before)) ** 2
    expected, possible = odds * squares, np.where(odds > POSSIBLE, squares, 0.0)
    width = after.shape[-1] if after.ndim > 1 else 1
    rows = np.maximum(expected.reshape(-1, width).sum(1), possible.reshape(-1, width).max(1))
    overall = max(float(expected.sum()), float(possible.max()))
    return Distance(overall**0.5 / norm, float(rows.max()) ** 0.5 / (norm / len(rows) ** 0.5))

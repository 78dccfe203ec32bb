"""The normalised rows that a norm's gamma multiplies; float64 inside, on any device."""

from __future__ import annotations

from torch import Tensor

__all__ = ["minus_mean", "x_hat"]


def x_hat(x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """(x - mean)·rstd, float32."""
    return (minus_mean(x, mean) * rstd).float()


def minus_mean(x: Tensor, mean: Tensor | None) -> Tensor:
    """x - mean, float64."""
    return x.double() if mean is None else x.double() - mean

"""RMSNorm and LayerNorm: a row of [.., h] is read once, its sums are taken by pairs.

    x̂ = (x - mean)·rstd      y = x̂·gamma + beta      dx = (g - x̂·mean(g·x̂) - mean(g))·rstd,  g = dy·gamma

RMSNorm has no mean. The gradients of gamma and beta are those of `sums`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from patches.order.kernels.pairs import LAUNCH, narrowed, on, pairs, power_of_two, widened

__all__ = ["input_gradient", "normalised"]

TILE = 4096


def normalised(
    x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y in the dtype of `x`, and each row's mean (None unless `centered`) and rstd, float32 [.., 1]."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centered else None
    h = x.shape[-1]
    if x.numel():
        grid, meta = _cut(x)
        with on(x):
            _forward[grid](
                x, gamma.contiguous(), gamma if beta is None else beta.contiguous(), y,
                rstd if mean is None else mean, rstd, rstd.numel(), h, eps,
                CENTERED=centered, BETA=beta is not None, **meta,
            )  # fmt: skip
    return y, mean, rstd


def input_gradient(dy: Tensor, x: Tensor, gamma: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """dx in the dtype of `x`."""
    x = x.contiguous()
    dx = torch.empty_like(x)
    if x.numel():
        grid, meta = _cut(x)
        with on(x):
            _backward[grid](
                dy.contiguous(), x, gamma.contiguous(), rstd if mean is None else mean, rstd, dx,
                rstd.numel(), x.shape[-1], CENTERED=mean is not None, **meta,
            )  # fmt: skip
    return dx


def _cut(x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    meta = _tile(x.shape[-1])
    return (-(-x.numel() // x.shape[-1] // meta["ROWS"]),), meta | LAUNCH


def _tile(h: int) -> dict[str, Any]:
    """Whole rows, several where they are short: 8 elements a thread, or 16 and more where they are long."""
    block = power_of_two(h)
    tile = max(block, TILE)
    return {"ROWS": tile // block, "BLOCK": block, "num_warps": min(max(8, tile // 512), 16)}


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, gamma, beta, y, mean, rstd, rows, h, eps,
    CENTERED: tl.constexpr, BETA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < h)[None, :]
    at = row[:, None] * h + column[None, :]
    hat = widened(tl.load(x + at, mask=inside, other=0.0))
    if CENTERED:
        middle = tl.div_rn(pairs(hat, ROWS, BLOCK), tl.cast(h, tl.float32))
        tl.store(mean + row, middle, mask=row < rows)
        hat = tl.where(inside, hat - middle[:, None], 0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(pairs(hat * hat, ROWS, BLOCK), tl.cast(h, tl.float32)) + eps))
    tl.store(rstd + row, scale, mask=row < rows)
    out = hat * scale[:, None] * widened(tl.load(gamma + column, mask=column < h, other=0.0))[None, :]
    if BETA:
        out += widened(tl.load(beta + column, mask=column < h, other=0.0))[None, :]
    tl.store(y + at, narrowed(out, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(dy, x, gamma, mean, rstd, dx, rows, h, CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < h)[None, :]
    at = row[:, None] * h + column[None, :]
    scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    g = widened(tl.load(dy + at, mask=inside, other=0.0))
    g *= widened(tl.load(gamma + column, mask=column < h, other=0.0))[None, :]
    hat = widened(tl.load(x + at, mask=inside, other=0.0))
    if CENTERED:
        hat = tl.where(inside, hat - tl.load(mean + row, mask=row < rows, other=0.0)[:, None], 0.0)
    hat *= scale
    out = g - hat * tl.div_rn(pairs(g * hat, ROWS, BLOCK), tl.cast(h, tl.float32))[:, None]
    if CENTERED:
        out -= tl.div_rn(pairs(g, ROWS, BLOCK), tl.cast(h, tl.float32))[:, None]
    tl.store(dx + at, narrowed(out * scale, dx.dtype.element_ty), mask=inside)

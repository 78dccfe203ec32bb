"""The order of every sum on a GPU that is not a product: adjacent pairs, then pairs of pairs, …

    x0  x1  x2  x3  x4  x5  0   0      a row of n, as if zeros filled it up to a power of two
      \\ /     \\ /     \\ /     \\ /
       +       +       +       +
          \\ /             \\ /
           +               +
                 \\ /
                  +

It is one tree for every n: a program, a launch, a leaf or a rank takes a subtree, so block and launch sizes do not
affect the order. Nor does the compiler: kernels add floats two at a time, which commutes, and multiplications are
not contracted into additions (`LAUNCH`). The error is at most ⌈log2 n⌉ · 2^-24 · Σ|x|.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "DTYPES",
    "INTERPRETED",
    "LAUNCH",
    "contiguous_rows",
    "narrowed",
    "on",
    "pairs",
    "pairs_of_rows",
    "power_of_two",
    "rounded",
    "widened",
]

LAUNCH = {"enable_fp_fusion": False}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)
_HERE = nullcontext()


@triton.jit
def pairs(x_RN, R: tl.constexpr, N: tl.constexpr):
    """Sum over the last of two dimensions, by adjacent pairs: [R]."""
    if N == 1:
        total_R = tl.reshape(x_RN, [R])
    else:
        total_R = pairs(tl.sum(tl.reshape(x_RN, [R, N // 2, 2]), axis=2), R, N // 2)
    return total_R


@triton.jit
def pairs_of_rows(x_NC, N: tl.constexpr, C: tl.constexpr):
    """Sum over the first of two dimensions, by adjacent pairs: [C]."""
    if N == 1:
        total_C = tl.reshape(x_NC, [C])
    else:
        total_C = pairs_of_rows(tl.sum(tl.reshape(x_NC, [N // 2, 2, C]), axis=1), N // 2, C)
    return total_C


@triton.jit
def widened(x):
    """float32 of `x`; bit by bit where it is bfloat16, which the interpreter does not convert correctly."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """float32 `x` rounded to nearest, ties to even; the interpreter cuts bfloat16 off instead."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        narrow = tl.where(x == x, upper, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(DTYPE)
    return narrow


def power_of_two(n: int) -> int:
    """The smallest power of two from `n` up."""
    return 1 << max(0, n - 1).bit_length()


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Launch kernels on the device of `x`."""
    here = INTERPRETED or x.device.index == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(x.device)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to `dtype`, with every zero +0; a GPU's arithmetic gives no NaN but the canonical one."""
    y = x.to(dtype).add(0.0)
    return y.masked_fill_(y.isnan(), math.nan) if INTERPRETED else y


def contiguous_rows(x: Tensor, dim: int = -1) -> Tensor:
    """`x` as rows [R, n] along `dim`, copied only where they do not lie side by side already."""
    return x.movedim(dim, -1).reshape(-1, x.shape[dim]).contiguous()

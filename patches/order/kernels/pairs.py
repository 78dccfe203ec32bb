"""The order of every sum on a GPU that is not a product: adjacent pairs, then pairs of pairs, …

    x0  x1  x2  x3  x4  x5  0   0      a row of n, as if zeros filled it up to a power of two
      \\ /     \\ /     \\ /     \\ /
       +       +       +       +
          \\ /             \\ /
           +               +
                 \\ /
                  +

It is one tree for every n, so it names no block: a program, a launch, a leaf or a rank takes a subtree, and no
size of theirs has a say. The compiler has none either: kernels add floats two at a time, which commutes,
and multiplications are not contracted into additions (`LAUNCH`). The error is at most ⌈log2 n⌉ · 2^-24 · Σ|x|.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from patches.order.kernels.variant import Variant

__all__ = [
    "LAUNCH",
    "contiguous_rows",
    "narrowed",
    "on",
    "pairs",
    "pairs_of_rows",
    "power_of_two",
    "variant",
    "widened",
]

LAUNCH = {"enable_fp_fusion": False}
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


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
    if INTERPRETED and tl.bfloat16 == DTYPE:
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
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def contiguous_rows(x: Tensor, dim: int = -1) -> Tensor:
    """`x` as rows [R, n] along `dim`, copied only where they do not lie side by side already."""
    return x.movedim(dim, -1).reshape(-1, x.shape[dim]).contiguous()


def variant(
    name: str, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], warps: int, divisible: str = ""
) -> Variant:
    """A variant for the static check.

    Args:
        types: argument to Triton type; arguments named neither here nor in `constexprs` are i32.
        divisible: arguments that are multiples of 16, separated by spaces, besides pointers.
    """
    signature = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constexprs, "constexpr")
    wide = set(divisible.split()) | {argument for argument, kind in types.items() if kind[0] == "*"}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {
        (i,): [["tt.divisibility", 16]] for i, argument in enumerate(signature) if argument in wide
    }
    return Variant(name, kernel, signature, constexprs, attrs, num_warps=warps, fp_fusion=False)

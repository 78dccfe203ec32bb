"""Trees of 2 to 8 leaves by `specialised_kernel`: when it is made for operands, and how it is launched.

Gluon is an experimental part of Triton, which its interpreter does not take: tests run the kernel on a model of it, and
`library` compares its bits with `gemm_kernel`'s before they are taken.
Legend: M, N result, K summed, B batch, R rows of an operand, be they M or N.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from patches.order.kernels.launches import Launch
from patches.order.kernels.plans import GROUP_M, PLANS, Layout, by_leaf, family, free_processors, suits_tma
from patches.order.kernels.specialised_kernel import kernel

__all__ = ["TILE_M", "TILE_N", "WARPS", "constants", "described", "launch", "product"]

TILE_M, TILE_N, TILE_K = 128, 128, 64
STAGES = 6  # of 32 KiB, beside 16 for the result: what shared memory holds
ACCUMULATORS = 4  # of 128 columns each: all that a multiprocessor has of tensor memory
WARPS = 8  # that add
MOST_LEAVES = 8
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def constants(leaves: int, pieces: int, b_BRK: Layout, family: int) -> dict[str, Any]:
    """What the kernel is compiled for, in the order of its arguments."""
    return {
        "LEAVES": leaves,
        "PIECES": pieces,
        "B_ALONG_K": b_BRK.along_k,
        "WGMMA": family == 90,
        "TILE_M": TILE_M,
        "TILE_N": TILE_N,
        "TILE_K": TILE_K,
        "STAGES": STAGES,
        "ACCUMULATORS": ACCUMULATORS,
        "GROUP": GROUP_M,
        "WARPS": WARPS,
    }


@lru_cache(maxsize=PLANS)
def launch(
    operands: tuple[Any, ...], leaves: int, pieces: int, dtype: torch.dtype, beside_collective: bool
) -> Launch | None:
    """How to launch the kernel for operands that are laid out like these; None where it is not made for them.

    Args:
        operands: the fields of two `Layout`s, of [M, K] and [K, N].
    """
    a_MK, b_KN = Layout(*operands[:5]), Layout(*operands[5:])
    if len(a_MK.shape) != 2 or not 2 <= leaves <= MOST_LEAVES or a_MK.dtype not in ELEMENTS:
        return None
    a_BMK, b_BNK, parts = a_MK.batched, b_KN.batched.transposed, leaves * pieces
    (_, M, K), (_, N, _) = a_BMK.shape, b_BNK.shape
    if not (M and N and K and a_BMK.along_k and suits_tma(a_BMK, parts) and suits_tma(b_BNK, parts)):
        return None
    tiles_m, tiles_n = triton.cdiv(M, TILE_M), triton.cdiv(N, TILE_N)
    programs = min(tiles_m * tiles_n, free_processors(a_MK.device, beside_collective))
    levels = (leaves // 2).bit_length() - 1
    return Launch(
        kernel,
        a_MK.device,
        programs,
        programs * levels * TILE_M * TILE_N,
        (_described(a_BMK, parts, TILE_M), _described(b_BNK, parts, TILE_N)),
        (M, N, triton.cdiv(K // parts, TILE_K), tiles_m, tiles_n, tiles_m * tiles_n, N),
        constants(leaves, pieces, b_BNK, family(a_MK.device)),
        {"num_warps": WARPS},
    )


def product(a: Tensor, b: Tensor, launch: Launch, dtype: torch.dtype, into: None) -> Tensor:
    """a·b as `launch`, which was made for them, has it, in a new tensor."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    launch.launch(a, b, out)
    return out


def described(dtype: torch.dtype, rows: int, along_k: bool) -> tuple[list[int], gl.NVMMASharedLayout]:
    """What a load brings of an operand, and how it then lies in shared memory."""
    block = [1, rows, TILE_K] if along_k else [1, TILE_K, rows]
    return block, gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[dtype])


def _described(x_BRK: Layout, parts: int, rows: int) -> Callable[[Tensor], TensorDescriptor]:
    sizes, strides = by_leaf(x_BRK, parts)
    block, layout = described(x_BRK.dtype, rows, x_BRK.along_k)
    return lambda x: TensorDescriptor(x, sizes[1:], strides[1:], block, layout)

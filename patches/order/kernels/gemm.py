"""Leaf and tree products: one Triton kernel (`gemm_kernel`) for all layouts, batches and numbers of leaves.

No split of K, no autotuning by shape: the k step and the MMA, which set the bits, are fixed per dtype and
architecture family (`bits.provenance` tells which). Tiles only cut M and N. Legend: M, N result, K summed, B batch,
R rows of an operand, be they M or N.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from patches.contract import UnsupportedError
from patches.order.kernels.gemm_kernel import kernel
from patches.order.kernels.pairs import INTERPRETED, on, rounded

__all__ = ["NAMES", "add_product", "family", "product", "tile_of"]

INTERPRETED_PROGRAMS = 3
GROUP_M = 8
FAMILIES = (9, 10)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Tile:
    """How a product is cut for the machine; only `k` may change results."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    register_levels: int


@lru_cache
def tile_of(dtype: torch.dtype, leaves: int, tma: bool, narrow: bool = False) -> Tile:
    """The tile for operands of `dtype`, one or several leaves, loads by TMA or by pointers (which take registers).

    `narrow`: N is at most 128, as of attention's products with values.
    """
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 2, 1)
    if not tma:
        return Tile(128, 128, 64, 8, 3, 1)
    if leaves == 1:
        return Tile(128, 128 if narrow else 256, 64, 8, 4, 0)
    return Tile(128, 128, 64, 8, 3, 2)


def product(
    a_MK: Tensor,
    b_KN: Tensor,
    leaves: int = 1,
    pieces: int = 1,
    dtype: torch.dtype = torch.float32,
    into: Tensor | None = None,
) -> Tensor:
    """a·b as the tree over `leaves` of K, accumulated in float32 and rounded once to `dtype`, zeros as +0.

    Args:
        a_MK: [M, K] or [B, M, K], bfloat16, float16 or float32, any strides.
        b_KN: [K, N] or [B, K, N], same dtype.
        leaves: a power of two; leaf j of K starts at ⌊j·K/leaves⌋.
        pieces: 2 where K holds [gate | up]: leaf j is gate[j], then up[j].
        into: float32 [M, N] or [B, M, N] that the float32 root is added to and which is returned; `dtype` is ignored.
    """
    _check(a_MK, b_KN, leaves, pieces, dtype, into)
    a_BMK, b_BKN = (x if x.dim() == 3 else x.unsqueeze(0) for x in (a_MK, b_KN))
    shape = (*a_MK.shape[:-1], b_KN.shape[-1])
    if into is None:
        # The interpreter does not round to bfloat16 correctly: there torch does.
        kept = torch.float32 if INTERPRETED else dtype
        make = torch.empty if a_MK.shape[-1] else torch.zeros
        out = make(shape, dtype=kept, device=a_MK.device)
    else:
        out = into
    if out.numel() and a_MK.shape[-1]:
        _launch(a_BMK, b_BKN, out if out.dim() == 3 else out.unsqueeze(0), leaves, pieces, into is not None)
    return rounded(out, dtype) if into is None and INTERPRETED else out


def add_product(into: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """into += a·b."""
    if into.dtype == torch.float32:
        product(a_MK, b_KN, into=into)
    else:
        into.add_(product(a_MK, b_KN))


def _launch(a_BMK: Tensor, b_BKN: Tensor, out_BMN: Tensor, leaves: int, pieces: int, add: bool) -> None:
    B, M, N = out_BMN.shape
    K = a_BMK.shape[2] // pieces
    device = a_BMK.device
    b_BNK = b_BKN.transpose(1, 2)
    a_along_k, b_along_k = (_along_k(x) for x in (a_BMK, b_BNK))
    parts = leaves * pieces
    tma = _suits_tma(a_BMK, a_along_k, parts) and _suits_tma(b_BNK, b_along_k, parts)
    tile = tile_of(a_BMK.dtype, leaves, tma, N <= 128)
    tiles_m, tiles_n = triton.cdiv(M, tile.m), triton.cdiv(N, tile.n)
    programs = min(_programs(device), B * tiles_m * tiles_n)
    levels = leaves.bit_length() - 1 - tile.register_levels
    scratch = None
    if levels > 0:
        scratch = torch.empty(programs * levels * tile.m * tile.n, dtype=torch.float32, device=device)
    with on(a_BMK):
        kernel[(programs,)](
            _descriptor(a_BMK, a_along_k, parts, tile.m, tile.k) if tma else a_BMK,
            _descriptor(b_BNK, b_along_k, parts, tile.n, tile.k) if tma else b_BKN,
            out_BMN,
            scratch,
            M,
            N,
            K,
            triton.cdiv(triton.cdiv(K, leaves), tile.k),
            tiles_m,
            tiles_n,
            B * tiles_m * tiles_n,
            *a_BMK.stride(),
            *b_BKN.stride(),
            *out_BMN.stride(),
            **_constexprs(tile, leaves, pieces, tma, a_along_k, b_along_k, add, a_BMK.dtype),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _constexprs(
    tile: Tile, leaves: int, pieces: int, tma: bool, a_along_k: bool, b_along_k: bool, add: bool, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "LEAVES": leaves,
        "PIECES": pieces,
        "TMA": tma,
        "A_ALONG_K": a_along_k,
        "B_ALONG_K": b_along_k,
        "ADD": add,
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,
        "TILE_M": tile.m,
        "TILE_N": tile.n,
        "TILE_K": tile.k,
        "REGISTER_LEVELS": tile.register_levels,
        "GROUP": GROUP_M,
    }


def _along_k(x_BRK: Tensor) -> bool:
    """Whether K, rather than the rows, lies side by side in memory."""
    return x_BRK.stride(2) == 1 or x_BRK.stride(1) != 1


def _suits_tma(x_BRK: Tensor, along_k: bool, parts: int) -> bool:
    """TMA wants tensor cores' dtypes, K in equal parts, one unit stride, others of multiples of 16 bytes."""
    if x_BRK.dtype == torch.float32 or x_BRK.shape[2] % parts or x_BRK.stride(2 if along_k else 1) != 1:
        return False
    *apart, _ = _by_leaf(x_BRK, along_k, parts)[1]
    bytes_apart = [stride * x_BRK.element_size() for stride in apart]
    return x_BRK.data_ptr() % 16 == 0 and all(0 < each < 1 << 40 and each % 16 == 0 for each in bytes_apart)


def _descriptor(x_BRK: Tensor, along_k: bool, parts: int, rows: int, k: int) -> TensorDescriptor:
    return TensorDescriptor(x_BRK, *_by_leaf(x_BRK, along_k, parts), [1, 1, rows, k] if along_k else [1, 1, k, rows])


def _by_leaf(x_BRK: Tensor, along_k: bool, parts: int) -> tuple[list[int], list[int]]:
    """Sizes and strides of [B, parts, R, K/parts], or with the last two swapped where rows lie side by side."""
    (B, R, K), (by_B, by_R, by_K) = x_BRK.shape, x_BRK.stride()
    inside = [(R, by_R), (K // parts, by_K)]
    dims = [(B, by_B), (parts, K // parts * by_K), *(inside if along_k else reversed(inside))]
    line = 16 // x_BRK.element_size()  # in place of the stride of a dimension of size 1, which is arbitrary
    return [size for size, _ in dims], [*(by if size > 1 else line for size, by in dims[:3]), 1]


@lru_cache
def family(device: torch.device) -> int:
    """The architecture of a GPU that products are made for, as in sm_90; `UnsupportedError` for others."""
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    if major not in FAMILIES:
        raise UnsupportedError(f"products are made for compute capability 9.x and 10.x, not {major}.{minor}")
    return 10 * major + minor


@lru_cache
def _programs(device: torch.device) -> int:
    return INTERPRETED_PROGRAMS if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _check(a: Tensor, b: Tensor, leaves: int, pieces: int, dtype: torch.dtype, into: Tensor | None) -> None:
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in NAMES)
    if a.dtype != b.dtype or a.dtype not in NAMES:
        raise TypeError(
            f"products take two operands of one dtype of {', '.join(map(str, NAMES))}: {a.dtype}, {b.dtype}"
        )
    if dtype not in NAMES:
        raise TypeError(f"a product is rounded to one of {allowed}, not {dtype}")
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    if a.dim() not in (2, 3) or a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a product takes [M, K]·[K, N] or [B, M, K]·[B, K, N], not {shapes}")
    if leaves < 1 or leaves & (leaves - 1):
        raise ValueError(f"leaves={leaves}: use a power of two")
    if pieces not in (1, 2) or a.shape[-1] % pieces:
        raise ValueError(f"pieces={pieces}: use 1, or 2 where K={a.shape[-1]} is even")
    if not (a.is_cuda and b.device == a.device) and not INTERPRETED:
        raise ValueError(f"both operands must be on one GPU: {a.device}, {b.device}")
    if into is None:
        return
    if into.dtype != torch.float32:
        raise TypeError(f"a product is added into float32, not {into.dtype}")
    if into.shape != (*a.shape[:-1], b.shape[-1]) or into.device != a.device:
        raise ValueError(
            f"the product of {shapes} on {a.device} cannot be added into {tuple(into.shape)} on {into.device}"
        )

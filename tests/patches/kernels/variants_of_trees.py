"""Variants of the warp-specialised kernel of trees; what holds for bfloat16 holds for float16."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from patches.order.kernels.plans import NAMES, Layout
from patches.order.kernels.specialised import TILE_M, TILE_N, WARPS, constants, described
from patches.order.kernels.specialised_kernel import kernel
from tests.patches.kernels.variant import Variant, divisible

__all__ = ["CASES", "laid_out", "of_trees"]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# dtype, layout, leaves, pieces, result: forward, and dgrad with and without a gate
CASES = (
    *((BF16, layout, leaves, 1, result) for layout in ("abᵀ", "ab") for leaves in (2, 8) for result in (BF16, FP32)),
    (BF16, "ab", 4, 2, BF16),
    (BF16, "ab", 8, 2, FP32),
    (FP16, "abᵀ", 8, 1, FP16),
)


def laid_out(dtype: torch.dtype, along_k: bool) -> Layout:
    """[1, 256, 256], with K or the rows side by side."""
    strides = (1 << 16, 256, 1) if along_k else (1 << 16, 1, 256)
    return Layout(torch.device("cuda"), (1, 256, 256), strides, dtype, 0)


def of_trees() -> Iterator[Variant]:
    for case in CASES:
        for family in (90, 100):
            yield _of(*case, family)


def _of(dtype: torch.dtype, layout: str, leaves: int, pieces: int, result: torch.dtype, family: int) -> Variant:
    b_along_k = "bᵀ" in layout
    constexprs = constants(leaves, pieces, laid_out(dtype, b_along_k), family)
    if leaves == 2:
        constexprs["scratch"] = None
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= {"out": f"*{NAMES[result]}", "scratch": "*fp32"} | dict.fromkeys(constexprs, "constexpr")
    for argument, rows, along_k in (("a", TILE_M, True), ("b", TILE_N, b_along_k)):
        block, shared = described(dtype, rows, along_k)
        signature[argument] = f"tensordesc<{NAMES[dtype]}{block},{shared!r}>"
    return Variant(
        name=f"specialised gemm {NAMES[dtype]} {layout} leaves={leaves} pieces={pieces} {NAMES[result]}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        attrs=divisible(signature, ("M", "N", "out_M")),
        num_warps=WARPS,
        expects="mma",
        families=(90,) if family == 90 else (100, 103),
    )

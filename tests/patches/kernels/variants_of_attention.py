"""Variants of the attention kernels; what holds for bfloat16 holds for float16."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from patches.order.kernels import attention_kernels
from patches.order.kernels.attentions import DELTA_ROWS, KERNELS, Tile, _constexprs, tile_of
from patches.order.kernels.plans import NAMES
from patches.order.visible import Packed, Visible
from tests.patches.kernels.variant import Variant, divisible

__all__ = ["of_attention"]

OPERANDS = ("q", "k", "v", "y", "dy", "dq")
KEPT = ("top", "inverse", "delta", "dk", "dv")
TABLE = ("q_starts", "q_lengths", "k_starts", "k_lengths")
DELTAS = Tile(DELTA_ROWS, 0, 4, 3)
NO_ROWS = torch.empty(0, dtype=torch.int32)
PACKED = Packed(NO_ROWS, NO_ROWS, NO_ROWS, NO_ROWS, 0, 0)
# title: (dtype, width of a head, band)
CASES = {
    "64 bf16": (torch.bfloat16, 64, Visible(right=0)),
    "128 bf16": (torch.bfloat16, 128, Visible(right=0)),
    "192 bf16": (torch.bfloat16, 192, Visible(right=0)),
    "256 bf16": (torch.bfloat16, 256, Visible(right=0)),
    "packed window 96 bf16": (torch.bfloat16, 96, Visible(left=1, right=0, packed=PACKED)),
    "128 fp32": (torch.float32, 128, Visible(right=0)),
}


def of_attention() -> Iterator[Variant]:
    """Forward, dq, and dk with dv, of every band and width class; deltas."""
    for title, (dtype, width, visible) in CASES.items():
        for name in KERNELS:
            yield _of(f"attention {name} {title}", name, dtype, width, visible)
    constexprs = {"D": 128, "W": 128, "TILE": DELTA_ROWS}
    yield _variant("attention deltas 128 bf16", attention_kernels.deltas, torch.bfloat16, constexprs, DELTAS)


def _of(title: str, name: str, dtype: torch.dtype, width: int, visible: Visible) -> Variant:
    padded = 1 << (width - 1).bit_length()
    tile = tile_of(name, padded, dtype)
    constexprs = _constexprs(name, tile, visible, width, padded)
    if visible.packed is None:
        constexprs |= dict.fromkeys(TABLE)
    return _variant(title, KERNELS[name], dtype, constexprs, tile)


def _variant(title: str, kernel: Any, dtype: torch.dtype, constexprs: dict[str, Any], tile: Tile) -> Variant:
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= {name: f"*{NAMES[dtype]}" for name in OPERANDS if name in signature}
    signature |= {name: "*fp32" for name in KEPT if name in signature}
    signature |= {name: "*i32" for name in TABLE if name in signature}
    signature |= {name: "fp32" for name in ("factor", "scale") if name in signature}
    signature |= dict.fromkeys(constexprs, "constexpr")
    on_tensor_cores = dtype != torch.float32 and kernel is not attention_kernels.deltas
    return Variant(
        name=title,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        attrs=divisible(signature, [argument for argument in signature if re.fullmatch(r"\w+_[SBH]", argument)]),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
        expects="mma" if on_tensor_cores else "",
        families=(90, 100, 103) if on_tensor_cores else (90, 100),
        fp_fusion=False,
    )

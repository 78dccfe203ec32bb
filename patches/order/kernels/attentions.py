"""Attention with O(S) memory: what it launches, how it is cut. `attention_kernels` says in which order it adds.

Legend: S rows of a sequence, B sequences, H query heads, G heads of keys and values, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from patches.order.kernels import attention_kernels as kernels
from patches.order.kernels.pairs import INTERPRETED, LAUNCH, on, power_of_two
from patches.order.polynomials import LOG2_E
from patches.order.visible import Visible, check_operands, keys_at_once

__all__ = ["KERNELS", "attention", "attention_gradient", "tile_of"]

DELTA_ROWS = 32
NO_END = 1 << 30  # keys after its own position that a query sees, of which it never has so many


KERNELS = {"forward": kernels.forward, "dq": kernels.query_gradient, "dkdv": kernels.key_gradients}


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut for the machine: rows of a program and rows of a step, which alone may change results.

    Attributes:
        registers: that a thread may have; None leaves it to the assembler, which on sm_100 hopes for two programs a
            processor, where shared memory has room for one.
    """

    rows: int
    step: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told of it."""
        of_all = {"num_warps": self.warps, "num_stages": self.stages}
        return of_all if self.registers is None else of_all | {"maxnreg": self.registers}


@lru_cache
def tile_of(kernel: str, width: int, dtype: torch.dtype) -> Tile:
    """The tile of the `kernel` "forward", "dq" or "dkdv" for heads of `width`, a power of two."""
    if dtype == torch.float32:
        rows = {"forward": 32 if width <= 128 else 16, "dq": 16, "dkdv": 32}[kernel]
        return Tile(rows, {"forward": keys_at_once(width, dtype), "dq": 32, "dkdv": 16}[kernel], 8, 1)
    return TILES[kernel][min(w for w in TILES[kernel] if w >= width)]


# As much as registers hold without a spill.
TILES = {
    "forward": {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
    "dq": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2, 255), 256: Tile(128, 32, 8, 2)},
    "dkdv": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
}


def attention(
    q_SBHD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, visible: Visible, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scale·q·kᵀ)·v, and what backward needs of each query: its largest score, one over its sum.

    Args:
        q_SBHD: [Sq, B, H, D], or [rows, 1, H, D] of packed sequences; any strides but D's, which is 1.
        k_SBGD: [Sk, B, G, D], G a divisor of H: query heads g·H/G to (g+1)·H/G - 1 share group g.
        scale: above 0.

    Returns:
        y [Sq, B, H, D] in the dtype of q; float32 [H, B·Sq] twice. A query that sees no key has 0 everywhere.
    """
    check_operands(q_SBHD, k_SBGD, v_SBGD, scale)
    if not INTERPRETED and not all(x.is_cuda and x.device == q_SBHD.device for x in (q_SBHD, k_SBGD, v_SBGD)):
        raise ValueError(f"q, k and v must be on one GPU: {q_SBHD.device}, {k_SBGD.device}, {v_SBGD.device}")
    q, k, v = (_side_by_side(x) for x in (q_SBHD, k_SBGD, v_SBGD))
    S, B, H, _ = q.shape
    make = torch.empty if visible.packed is None and k.shape[0] else torch.zeros
    y = make(q.shape, dtype=q.dtype, device=q.device)
    top, inverse = (make((H, B * S), dtype=torch.float32, device=q.device) for _ in range(2))
    if y.numel() and k.shape[0]:
        _launch("forward", (q, k, v, y), (top, inverse), (q, k, v, y), visible, scale)
    return y, top, inverse


def attention_gradient(
    dy_SBHD: Tensor, q_SBHD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, y_SBHD: Tensor, top: Tensor, inverse: Tensor,
    visible: Visible, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq in its dtype, and what every query head gives dk and dv: float32 [Sk, B, H, D] each, not yet summed over G."""
    q, k, v, y, dy = (_side_by_side(x) for x in (q_SBHD, k_SBGD, v_SBGD, y_SBHD, dy_SBHD))
    make = torch.empty if visible.packed is None and q.shape[0] and k.shape[0] else torch.zeros
    dq = make(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (make((*k.shape[:2], *q.shape[2:]), dtype=torch.float32, device=q.device) for _ in range(2))
    if not (q.numel() and k.numel()):
        return dq, dk, dv
    delta = _deltas(y, dy)
    kept = (top, inverse, delta)
    _launch("dq", (q, k, v, dy, dq), kept, (q, k, v, dy, dq), visible, scale, scale)
    _launch("dkdv", (q, k, v, dy, dk, dv), kept, (q, k, v, dy, dk), visible, scale, scale)
    return dq, dk, dv


def _deltas(y: Tensor, dy: Tensor) -> Tensor:
    S, B, H, D = y.shape
    delta = torch.empty((H, B * S), dtype=torch.float32, device=y.device)
    with on(y):
        kernels.deltas[(triton.cdiv(B * S, DELTA_ROWS) * H,)](
            y, dy, delta, *_strides(y), *_strides(dy), B, B * S, H,
            D=D, W=power_of_two(D), TILE=DELTA_ROWS, num_warps=4, **LAUNCH,
        )  # fmt: skip
    return delta


def _launch(
    name: str, tensors: tuple[Tensor, ...], kept: tuple[Tensor, ...], strided: tuple[Tensor, ...],
    visible: Visible, scale: float, *more: float,
) -> None:  # fmt: skip
    q, k = tensors[:2]
    S, B, H, D = q.shape
    packed = visible.packed
    queries, keys = (S, k.shape[0]) if packed is None else (packed.longest_q, packed.longest_k)
    batches = B if packed is None else len(packed.q_starts)
    tile = tile_of(name, width := max(16, power_of_two(D)), q.dtype)
    tiles = triton.cdiv(keys if name == "dkdv" else queries, tile.rows)
    if not batches or not tiles:
        return
    table = (None,) * 4 if packed is None else (packed.q_starts, packed.q_lengths, packed.k_starts, packed.k_lengths)
    with on(q):
        KERNELS[name][(tiles * H * batches,)](
            *tensors, *kept, *table, *(stride for x in strided for stride in _strides(x)),
            queries, keys, H, H // k.shape[2], tiles, B * S, visible.offset, visible.left or 0,
            NO_END if visible.right is None else visible.right,
            scale * LOG2_E, *more,
            **_constexprs(name, tile, visible, D, width), **tile.options, **LAUNCH,
        )  # fmt: skip


def _constexprs(name: str, tile: Tile, visible: Visible, D: int, width: int) -> dict[str, Any]:
    return {
        "PACKED": visible.packed is not None, "LEFT": visible.left is not None,
        "D": D, "W": width, "TILE": tile.rows, "QUERIES" if name == "dkdv" else "KEYS": tile.step,
    }  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

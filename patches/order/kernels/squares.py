"""Σx² over any number of tensors, exactly, in one pass: no order, cut or rank can change it.

A float32 is m·2^(e-150) with a whole m < 2^24, so m² < 2^48 begins at bit 2(e-1) of one long whole number whose
last bit is worth 2^-298. That number is kept as BINS 64-bit integers, one for every 16 of its bits:

    bins        …  | b+3 | b+2 | b+1 |  b  |  …        b = ⌊2(e-1) / 16⌋
    squares        | high digits | low digits |        m²·2^(2(e-1) mod 16) < 2^62, its 32 low and high bits apart

A tile adds up the squares of each b that it holds, and its sums' digits to the bins. Whole numbers add exactly, hence
atomically in any order, and across ranks; a bin has room for 2^49 elements. Two more count infinities and NaNs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from patches.order.kernels.pairs import DTYPES, INTERPRETED, LAUNCH, on, widened

__all__ = ["euclidean_norm", "root", "squares"]

BINS = tl.constexpr(35)
LAST_BIT = -298
TILE = 4096


def euclidean_norm(tensors: Sequence[Tensor], device: torch.device, all_reduce: Callable[[Tensor, Any], None]) -> float:
    """√Σx² over the tensors of all ranks."""
    bins = squares(tensors, device)
    all_reduce(bins, dist.ReduceOp.SUM)
    return root(bins)


def squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The bins and the two counters of all tensors: int64 [BINS + 2] on `device`, to be summed over ranks."""
    bins = torch.zeros(BINS.value + 2, dtype=torch.int64, device=device)
    for dtype in DTYPES:
        flat = [x.detach().to(device).contiguous() for x in tensors if x.dtype == dtype and x.numel()]
        if flat:
            table = _table(flat, device)
            with on(bins):
                _squares[(len(table),)](table, bins, flat[0], TILE=TILE, num_warps=8, **LAUNCH)
    unknown = {x.dtype for x in tensors} - set(DTYPES)
    if unknown:
        raise TypeError(f"squares are summed of {', '.join(map(str, DTYPES))}, not {', '.join(map(str, unknown))}")
    return bins


def root(bins: Tensor) -> float:
    """√Σx² of summed `squares`, rounded to float64 from the exact sum; infinite or NaN where an x was."""
    *digits, infinities, nans = bins.tolist()
    if infinities or nans:
        return math.nan if nans else math.inf
    total = sum(digit << 16 * i for i, digit in enumerate(digits))
    return math.sqrt(math.ldexp(float(total), LAST_BIT))


def _table(flat: list[Tensor], device: torch.device) -> Tensor:
    """Address and size of every tile of every tensor: int64 [tiles, 2]."""
    sizes = torch.tensor([x.numel() for x in flat])
    tiles = (sizes + TILE - 1) // TILE
    of_tile = torch.repeat_interleave(torch.arange(len(flat)), tiles)
    first = (torch.arange(len(of_tile)) - (tiles.cumsum(0) - tiles)[of_tile]) * TILE
    starts = torch.tensor([x.data_ptr() for x in flat])
    addresses = starts[of_tile] + first * flat[0].element_size()
    table = torch.stack([addresses, (sizes[of_tile] - first).clamp(max=TILE)], 1)
    return table if INTERPRETED else table.pin_memory().to(device, non_blocking=True)


@triton.jit
def _squares(table, bins, like, TILE: tl.constexpr):
    """like: a pointer of the tensors' type, which a table of addresses does not have."""
    x = tl.load(table + 2 * tl.program_id(0)).to(like.dtype)
    size = tl.load(table + 2 * tl.program_id(0) + 1)
    i = tl.arange(0, TILE)
    bits = widened(tl.load(x + i, mask=i < size, other=0.0)).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 0xFF
    fraction = bits & 0x7FFFFF
    special = exponent == 0xFF
    whole = tl.where(exponent == 0, fraction, fraction | 0x800000).to(tl.int64)
    exponent = tl.maximum(exponent, 1) - 1
    square = (whole * whole) << (2 * (exponent & 7)).to(tl.int64)
    b = tl.where((whole == 0) | special, -1, exponent >> 3)
    top = tl.max(b, axis=0)
    while top >= 0:
        chosen = tl.where(b == top, square, 0)
        low = tl.sum(chosen & 0xFFFFFFFF, axis=0)
        high = tl.sum(chosen >> 32, axis=0)
        tl.atomic_add(bins + top, low & 0xFFFF, sem="relaxed")
        tl.atomic_add(bins + top + 1, (low >> 16) & 0xFFFF, sem="relaxed")
        tl.atomic_add(bins + top + 2, (low >> 32) + (high & 0xFFFF), sem="relaxed")
        tl.atomic_add(bins + top + 3, high >> 16, sem="relaxed")
        b = tl.where(b == top, -1, b)
        top = tl.max(b, axis=0)
    specials = tl.sum(special.to(tl.int32), axis=0)
    if specials > 0:
        nans = tl.sum((special & (fraction != 0)).to(tl.int32), axis=0)
        tl.atomic_add(bins + BINS, (specials - nans).to(tl.int64), sem="relaxed")
        tl.atomic_add(bins + BINS + 1, nans.to(tl.int64), sem="relaxed")

"""Σx² over any number of tensors and ranks, to float64 accuracy: every part of it is added exactly, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patches.order.exact.slices import FLOAT64_BITS

__all__ = ["euclidean_norm", "sum_of_squares"]

# A grid on which 2^37 squares of 16 bits sum exactly; 5 slices keep 80 bits below the largest.
BITS = 16
SLICES = 5
CHUNK = 1 << 15


def euclidean_norm(tensors: Sequence[Tensor], device: torch.device, all_reduce: Callable[[Tensor, Any], None]) -> float:
    """√Σx² over the tensors of all ranks, which first agree on the largest of them."""
    tops = [piece.abs().amax().float() for piece in _pieces(tensors)]
    top = torch.stack(tops).amax() if tops else torch.zeros((), device=device)
    nan = top.isnan()
    flags = torch.stack([torch.where(nan, torch.inf, top).double(), nan.double()]).to(device)
    all_reduce(flags, dist.ReduceOp.MAX)
    largest, any_nan = flags.tolist()
    if any_nan or largest == float("inf") or largest == 0:
        return float("nan") if any_nan else largest
    power = 2.0 ** torch.tensor(largest, dtype=torch.float64).frexp().exponent.item()
    slices = sum_of_squares(tensors, power).to(device)
    all_reduce(slices, dist.ReduceOp.SUM)
    return float(sum(slices.tolist())) ** 0.5


def sum_of_squares(tensors: Sequence[Tensor], largest: float) -> Tensor:
    """Slices of Σx² over all tensors: float64 [SLICES], each exact, so that ranks may add them in any order.

    Args:
        tensors: float32, bfloat16 or float16; together with the other ranks' at most 2^37 elements.
        largest: a power of two above every |x| on every rank; it sets the grid.

    What lies below 2^-80 of the largest square is rounded per element: no layout can change it.
    """
    device = tensors[0].device if tensors else None
    out = torch.zeros(SLICES, dtype=torch.float64, device=device)
    shifts = [largest * largest * 1.5 * 2.0 ** (FLOAT64_BITS - 1 - BITS * (i + 1)) for i in range(SLICES)]
    for piece in _pieces(tensors):
        wide, parts = piece.to(torch.float64, copy=True), []
        squares, head = wide.mul_(wide), torch.empty_like(wide)
        for shift in shifts:
            torch.add(squares, shift, out=head).sub_(shift)
            squares.sub_(head)
            parts.append(head.sum())
        out.add_(torch.stack(parts))
    return out


def _pieces(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """All elements, flat, up to CHUNK at a time, which stay in a core's cache; small tensors come together."""
    held: list[Tensor] = []
    for tensor in tensors:
        for piece in tensor.detach().reshape(-1).split(CHUNK) if tensor.numel() else ():
            if held and (piece.dtype != held[0].dtype or sum(map(len, held)) + len(piece) > CHUNK):
                yield _joined(held)
                held = []
            held.append(piece)
    if held:
        yield _joined(held)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]

"""Elementwise functions whose value does not depend on where an element lies.

ATen runs a vector body over a tensor and a scalar tail over what is left of it, of each thread's part of it.
For exp, silu, gelu, … body and tail are different functions, and tensor parallelism moves the tail. Here
every element goes through the body: operands are laid out flat and padded until no thread has a tail.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["without_tail"]

# ATen: widest vector loop (two AVX512 registers of bfloat16, doubled), and at::internal::GRAIN_SIZE.
VECTOR = 128
GRAIN = 32768


def without_tail(kernel: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`kernel(*args, **kwargs)` with its tensor arguments broadcast, flat and padded; the result in their shape."""
    positions = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.dim()]
    if not positions:
        return kernel(*args, **kwargs)
    first = args[positions[0]]
    if all(args[i].shape == first.shape and args[i].is_contiguous() for i in positions):
        count = first.numel()
        full = _padded_size(count, torch.get_num_threads())
        if full == count:
            return kernel(*args, **kwargs)
        tensors, shape = tuple(args[i] for i in positions), first.shape
    else:
        tensors = torch.broadcast_tensors(*(args[i] for i in positions))
        shape, count = tensors[0].shape, tensors[0].numel()
        full = _padded_size(count, torch.get_num_threads())
    padded = list(args)
    for i, tensor in zip(positions, tensors, strict=True):
        flat = tensor.reshape(-1)
        padded[i] = flat if full == count else torch.cat([flat, flat.new_ones(full - count)])
    result = kernel(*padded, **kwargs)[:count].view(shape)
    if first.is_contiguous() or first.shape != shape:
        return result
    return torch.empty_like(first, dtype=result.dtype).copy_(result)  # ATen keeps the first operand's layout


@lru_cache
def _padded_size(count: int, threads: int) -> int:
    """The smallest size from `count` up that ATen splits over `threads` into whole vectors."""
    size = count
    while True:
        parts = max(1, min(threads, -(-size // GRAIN)))
        padded = -(-size // (VECTOR * parts)) * VECTOR * parts
        if padded == size:
            return size
        size = padded

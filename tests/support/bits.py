"""Tensors bit by bit: NaN equals NaN, -0 differs from +0."""

from __future__ import annotations

import torch
from torch import Tensor


def bits(x: Tensor) -> Tensor:
    """The elements as whole numbers, on the CPU."""
    return x.cpu().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(bits(x), bits(y))


def assert_same_bits(x: Tensor, y: Tensor) -> None:
    assert x.dtype == y.dtype and x.shape == y.shape
    differ = bits(x) != bits(y)
    assert not differ.any(), f"{differ.sum()} of {x.numel()} elements differ"


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

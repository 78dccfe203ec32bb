"""How far two tensors of one shape are apart, in the numbers of `tpcheck compare`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tpcheck.trace.compare.logical import Logical
from tpcheck.trace.compare.metrics import distance, numbers

__all__ = ["apart"]

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def apart(a: Tensor, b: Tensor) -> dict[str, Any]:
    """The numbers of `tpcheck.trace.compare.metrics.Numbers`, of B against A."""
    one, other = _logical(a), _logical(b)
    return dataclasses.asdict(numbers(one, other, distance(one, other)))


def _logical(tensor: Tensor) -> Logical:
    bits = tensor.detach().contiguous().view(BITS[tensor.dtype]).numpy()
    return Logical(str(tensor.dtype).removeprefix("torch."), bits.view(f"<u{bits.itemsize}"), (), None, ())

"""The norm of gradients that lie on many ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patches.order.backend import backend

__all__ = ["gradient_norm"]


def gradient_norm(grads: list[Tensor], groups: list[dist.ProcessGroup], device: torch.device) -> float:
    """‖grads‖₂ over all ranks of `groups`, to float64 accuracy: no shard layout, bucket or rank order can change it.

    Infinities and NaNs come through as they are.
    """

    def all_reduce(x: Tensor, op: Any) -> None:
        for group in groups:
            dist.all_reduce(x, op=op, group=group)

    return backend(device).euclidean_norm(grads, device, all_reduce)

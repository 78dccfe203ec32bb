"""The receiving side of `order.collectives` on a CPU: ranks' float32 parts in, their rounded tree sum out."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from patches.contract import WITHOUT_SYMMETRIC_MEMORY, UnsupportedError
from patches.order.exact.slices import rounded
from patches.order.tree import tree_sum

__all__ = ["begin_reading_peers", "check_symmetric_memory", "rounded_tree_sum"]


def rounded_tree_sum(parts_tN: Tensor, dtype: torch.dtype, divide_by: int = 1) -> Tensor:
    """`tree_sum` of `parts_tN` over t, divided, rounded once to `dtype`: [N]."""
    root = tree_sum(parts_tN.unbind())
    return rounded(root / divide_by if divide_by > 1 else root, dtype)


def begin_reading_peers(root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1) -> NoReturn:
    """Refused: CPUs have no symmetric memory."""
    check_symmetric_memory(root.device)


def check_symmetric_memory(device: torch.device) -> NoReturn:
    """Raise `UnsupportedError`."""
    raise UnsupportedError(f"symmetric_memory=True needs GPUs, not a {device.type}: {WITHOUT_SYMMETRIC_MEMORY}")

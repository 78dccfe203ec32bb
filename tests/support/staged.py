"""Collectives of CUDA tensors between ranks that share one GPU: through gloo, by way of the CPU.

NCCL refuses two ranks on one device, and gloo takes CUDA tensors in some collectives only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Collectives whose first argument, or its elements, are what they write to.
STAGED = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "reduce_scatter_tensor",
)


def stage(is_far: Callable[[Tensor], bool] = lambda tensor: tensor.is_cuda) -> None:
    """Replace `torch.distributed`'s functions; before Megatron is imported, which keeps some of them.

    Args:
        is_far: which tensors are staged.
    """
    for name in STAGED:
        setattr(dist, name, _staged(getattr(dist, name), is_far))


class _Done:
    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _staged(collective: Callable[..., Any], is_far: Callable[[Tensor], bool]) -> Callable[..., Any]:
    @functools.wraps(collective)
    @torch.no_grad()
    def call(target: Any, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        near = _near(target, is_far)
        others = [_near(arg, is_far) for arg in args], {name: _near(arg, is_far) for name, arg in kwargs.items()}
        collective(near, *others[0], **others[1])
        for far, copy in zip(*(x if isinstance(x, list) else [x] for x in (target, near)), strict=True):
            if far is not copy:
                far.copy_(copy)
        return _Done() if async_op else None

    return call


def _near(value: Any, is_far: Callable[[Tensor], bool]) -> Any:
    if isinstance(value, list):
        return [_near(one, is_far) for one in value]
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) and is_far(value) else value

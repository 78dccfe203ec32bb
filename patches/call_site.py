"""What every call site asks: the contract in force, and how a dimension is spread over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch

from patches.contract import Contract
from patches.ops.sharded import Shards
from patches.registry import REGISTRY

__all__ = ["contract", "is_complete", "mark_complete", "over_tp", "tp_group", "whole"]

COMPLETE = "_patches_gradient_is_complete"


def contract() -> Contract:
    if REGISTRY.contract is None:
        raise RuntimeError("a patched call ran after patches.disable()")
    return REGISTRY.contract


def tp_group(module: Any = None) -> Any:
    """The module's own tensor-parallel group where it has one, else Megatron's."""
    from megatron.core import parallel_state

    group = getattr(module, "tp_group", None)
    return group if group is not None else parallel_state.get_tensor_model_parallel_group()


def over_tp(group: Any = None) -> Shards:
    """A dimension spread over the tensor-parallel ranks."""
    return Shards(contract(), group if group is not None else tp_group())


def whole() -> Shards:
    """A dimension that every rank holds whole; its sum walks the same tree without communication."""
    return Shards(contract())


def mark_complete(parameter: torch.nn.Parameter) -> None:
    """Say that backward gives this parameter its gradient over all tensor-parallel ranks."""
    setattr(parameter, COMPLETE, True)


def is_complete(parameter: torch.nn.Parameter) -> bool:
    return getattr(parameter, COMPLETE, False)

"""What every call site asks: the contract in force, and how a dimension is spread over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch

from patches.contract import Contract
from patches.ops.norm import HEADS
from patches.ops.sharded import Shards
from patches.registry import REGISTRY

__all__ = [
    "context_group",
    "contract",
    "is_grad_reduced",
    "mark_grad_reduced",
    "norm_shards",
    "replicated",
    "tp_group",
    "tp_sharded",
]

REDUCED = "_patches_grad_reduced"


def contract() -> Contract:
    """The one that `patches.enable()` was given."""
    if REGISTRY.contract is None:
        raise RuntimeError("a patched call ran after patches.disable()")
    return REGISTRY.contract


def tp_group(module: Any = None) -> Any:
    """The module's own tensor-parallel group where it has one, else Megatron's."""
    from megatron.core import parallel_state

    group = getattr(module, "tp_group", None)
    return group if group is not None else parallel_state.get_tensor_model_parallel_group()


def context_group() -> Any:
    """Megatron's context-parallel group; None where every rank has whole sequences."""
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group(check_initialized=False)
    return group if group is not None and group.size() > 1 else None


def tp_sharded(group: Any = None) -> Shards:
    """A dimension spread over the tensor-parallel ranks: of `group`, or of Megatron's."""
    return Shards(contract(), group if group is not None else tp_group(), context_group())


def replicated() -> Shards:
    """A dimension that every rank holds whole; its sum walks the same tree without communication."""
    return Shards(contract(), context=context_group())


def norm_shards(leaf_dim: int, sequence_parallel: bool) -> Shards:
    """How the dimension is spread that a norm's parameter gradients sum over: heads always are, tokens under SP."""
    return tp_sharded() if leaf_dim == HEADS or sequence_parallel else replicated()


def mark_grad_reduced(*parameters: torch.nn.Parameter | None) -> None:
    """Say that backward gives these parameters their gradients over all tensor-parallel ranks."""
    for parameter in parameters:
        if parameter is not None:
            setattr(parameter, REDUCED, True)


def is_grad_reduced(parameter: torch.nn.Parameter) -> bool:
    """Whether `mark_grad_reduced` was told of it."""
    return getattr(parameter, REDUCED, False)

"""DeepSpeed: when its engine steps, what ZeRO has cut put together again, and where AutoTP has cut.

    ZeRO 0       every data-parallel rank has all of every parameter, gradient and state: nothing to do
    ZeRO 1, 2    gradients and state are flat pieces of all parameters in a row
    ZeRO 3       so are the weights
    AutoTP       linear layers are cut over tensor parallelism, at sizes that need not be equal

DeepSpeed's documented `safe_get_full_…` put pieces together over data parallelism. They communicate, so every rank
has to ask for the same parameters in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from tpcheck.errors import TpcheckError
from tpcheck.trace.record.shards import Shards

__all__ = ["autotp_activation", "autotp_of", "autotp_parameter", "engine_of", "full_gradient", "full_states",
           "full_weight", "is_cut", "set_full_gradient"]  # fmt: skip

# AutoTP's layers whose (output, input) is cut in features; by exact name, as subclasses cut otherwise.
FEATURES = {"LinearLayer": (True, False), "VocabParallelLinear": (True, False), "LinearAllreduce": (False, True)}


def engine_of(models: Sequence[torch.nn.Module]) -> Any:
    """The engine that `deepspeed.initialize` made, if that is what is traced."""
    engine = next((model for model in models if hasattr(model, "_take_model_step")), None)
    if engine is None and any(is_cut(parameter) for model in models for parameter in model.parameters()):
        raise TpcheckError(
            "these parameters belong to a DeepSpeed engine: trace the engine that deepspeed.initialize returned, "
            "not the model in it"
        )
    return engine


def is_cut(parameter: torch.Tensor) -> bool:
    """Whether ZeRO has cut the parameter's gradient and state: at stage 3, or 1 and 2."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def full_weight(parameter: torch.Tensor) -> torch.Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def full_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """Summed over data parallelism, not yet clipped; to be asked for between backward and step."""
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter) if parameter.requires_grad else None


def set_full_gradient(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_grad

    safe_set_full_grad(parameter, gradient)


def full_states(engine: Any, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The optimizer's state by key, and as `main` the float32 parameter that it updates, if there is one."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not parameter.requires_grad:
        return
    if parameter.dtype != torch.float32:
        yield "main", safe_get_full_fp32_param(parameter)
    states = engine.optimizer.optimizer.state.values()
    for key in sorted({key for held in states for key, value in held.items() if _has_elements(value)}):
        yield key, safe_get_full_optimizer_state(parameter, key)


def _has_elements(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def autotp_of(models: Sequence[torch.nn.Module]) -> tuple[int, int] | None:
    """This rank and the number of ranks in AutoTP's tensor parallelism."""
    if "deepspeed" not in sys.modules:
        return None
    found = {
        (int(module.tp_index), int(module.tp_world_size))  # type: ignore[arg-type]
        for model in models
        for module in model.modules()
        if hasattr(module, "tp_index") and hasattr(module, "tp_world_size")
    }
    return found.pop() if len(found) == 1 else None


def autotp_parameter(parameter: torch.Tensor, shards: Shards, tp_rank: int) -> Shards:
    """A parameter of a layer that AutoTP has replaced; one that it has cut otherwise than in a row is `assumed`."""
    layout = getattr(parameter, "ds_autotp_universal_checkpoint_meta", {})
    sizes, dim = layout.get("partition_sizes"), layout.get("partition_dim")
    if layout.get("replicated"):
        return shards
    if not sizes or dim is None or layout.get("sub_param_sizes") or shards.shape[dim] != sizes[tp_rank]:
        return replace(shards, assumed=True)
    return shards.placed(dim, sum(sizes[:tp_rank]), sum(sizes), "row" if dim else "column")


def autotp_activation(module: Any, shards: Shards, which: int, tp_rank: int) -> Shards:
    """The output (`which` is 0) or input (1) of a layer that AutoTP has replaced."""
    sizes = getattr(module, "_partition_sizes", None)
    cut = FEATURES.get(type(module).__name__, (False, False))[which] and not getattr(module, "gather_output", False)
    if not cut or not sizes or shards.shape[-1] != sizes[tp_rank]:
        return replace(shards, assumed=True)
    return shards.placed(len(shards.shape) - 1, sum(sizes[:tp_rank]), sum(sizes), "column")

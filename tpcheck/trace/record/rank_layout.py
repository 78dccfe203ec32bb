"""Where this rank stands: its place in tensor, data, pipeline and expert parallelism, asked of whoever set them up.

Megatron's parallel_state    DTensor parameters' device mesh    AutoTP's layers    torch.distributed alone: DP
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from tpcheck.errors import TpcheckError
from tpcheck.trace.record.deepspeed import autotp_of

__all__ = ["RankLayout", "megatron_config", "rank_layout_of"]


@dataclass(frozen=True)
class RankLayout:
    """A rank's coordinates.

    Attributes:
        grad_scale: factor from this rank's activation gradients to the global batch's: a rank's loss is a mean over
            its own samples only.
    """

    rank: int = 0
    world: int = 1
    tp_rank: int = 0
    tp: int = 1
    dp_rank: int = 0
    dp: int = 1
    pp_rank: int = 0
    pp: int = 1
    ep_rank: int = 0
    ep: int = 1
    etp_rank: int = 0
    etp: int = 1
    sequence_parallel: bool = False
    grad_scale: float = 1.0

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {**fields, "gradients": fields.pop("grad_scale")}


def rank_layout_of(models: Sequence[torch.nn.Module]) -> RankLayout:
    """This rank's place, found out from the process groups and the models."""
    if not (dist.is_available() and dist.is_initialized()):
        return RankLayout()
    megatron = sys.modules.get("megatron.core.parallel_state")
    config = megatron_config(models)
    if megatron and config is not None and megatron.model_parallel_is_initialized():
        return _megatron(megatron, config)
    rank, world = dist.get_rank(), dist.get_world_size()
    if (autotp := autotp_of(models)) is not None:
        tp_rank, tp_size = autotp
        return RankLayout(rank, world, tp_rank, tp_size, rank // tp_size, world // tp_size, grad_scale=tp_size / world)
    mesh = _mesh(models)
    if mesh is None:
        return RankLayout(rank, world, dp_rank=rank, dp=world, grad_scale=1 / world)
    tp = next((name for name in mesh.mesh_dim_names or () if "tp" in name), None)
    if tp is None:
        return RankLayout(rank, world, dp_rank=rank, dp=world, grad_scale=1 / world)
    tp_rank, tp_size = mesh.get_local_rank(tp), mesh.size(mesh.mesh_dim_names.index(tp))
    # Ranks of a mesh are in row-major order, tensor parallelism innermost.
    return RankLayout(rank, world, tp_rank, tp_size, rank // tp_size, world // tp_size, grad_scale=tp_size / world)


def megatron_config(models: Sequence[torch.nn.Module]) -> Any:
    """The TransformerConfig that megatron-core's modules share; None for other models."""
    for model in models:
        for module in model.modules():
            config = getattr(module, "config", None)
            if hasattr(config, "tensor_model_parallel_size") and hasattr(config, "gated_linear_unit"):
                return config
    return None


def _megatron(state: Any, config: Any) -> RankLayout:
    if (size := getattr(config, "context_parallel_size", 1)) != 1:
        raise TpcheckError(f"context_parallel_size={size} is not traced: all other kinds of parallelism are")
    pp = state.get_pipeline_model_parallel_world_size()
    if pp > 1 and getattr(config, "recompute_granularity", None):
        # While one microbatch is recomputed, others are on their way, and nothing says which it is.
        raise TpcheckError(f"recompute_granularity={config.recompute_granularity} in a pipeline of {pp} is not traced: "
                           "trace without it, or without a pipeline")  # fmt: skip
    dp = state.get_data_parallel_world_size()
    return RankLayout(
        dist.get_rank(),
        dist.get_world_size(),
        state.get_tensor_model_parallel_rank(),
        state.get_tensor_model_parallel_world_size(),
        state.get_data_parallel_rank(),
        dp,
        state.get_pipeline_model_parallel_rank(),
        pp,
        state.get_expert_model_parallel_rank(),
        state.get_expert_model_parallel_world_size(),
        state.get_expert_tensor_parallel_rank(),
        state.get_expert_tensor_parallel_world_size(),
        bool(config.sequence_parallel),
        1.0 if config.calculate_per_token_loss else 1 / dp,
    )


def _mesh(models: Sequence[torch.nn.Module]) -> Any:
    """The device mesh with the most dimensions among those of the parameters."""
    meshes = [
        parameter.device_mesh
        for model in models
        for parameter in model.parameters()
        if hasattr(parameter, "device_mesh")
    ]
    meshes = [mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh for mesh in meshes]
    return max(meshes, key=lambda mesh: mesh.ndim, default=None)

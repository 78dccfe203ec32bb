"""megatron-core's own parallel layers, with given weights, on ranks of a study.

    column   W [N, K], rank r of t has rows    [r·N/t, (r+1)·N/t):  y is spread over ranks, dx is a sum over them
    row      W [N, K], rank r of t has columns [r·K/t, (r+1)·K/t):  y is a sum over ranks, dx is spread over them

T tokens, K features in, N features out; a batch of one, as Megatron has it: x [T, 1, K].
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

import patches
from tpcheck.config.schema import RunConfig
from tpcheck.config.strategies import Strategy
from tpcheck.run.dtypes import DTYPES

__all__ = ["begin", "drawn", "layer", "layer_config", "own_share", "random_tokens", "share"]

CUT = {"column": 0, "row": 1}  # the dimension of W that ranks share
Kind = Literal["column", "row"]


def begin(strategy: Strategy, tp: int | None = None) -> int:
    """Make tensor-parallel groups of `tp` ranks, or one of all ranks of this process group; their size."""
    if strategy == "stock":
        patches.cpu.enable()
    else:
        patches.enable(strategy)
    logging.getLogger("megatron").setLevel(logging.ERROR)  # that generators are one on a CPU, and states implicit
    tp = tp or dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(1234)
    return tp


def layer_config(dtype: str, hidden: int) -> TransformerConfig:
    """Of layers alone, without sequence parallelism."""
    tp = dist.get_world_size()
    return TransformerConfig(
        num_layers=1, hidden_size=hidden, num_attention_heads=tp, tensor_model_parallel_size=tp,
        params_dtype=DTYPES[dtype], use_cpu_initialization=True, gradient_accumulation_fusion=False,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def layer(kind: Kind, config: TransformerConfig, weight_NK: Tensor) -> Any:
    """Megatron's layer of this kind, without a bias, with this rank's part of the weight."""
    rows, columns = weight_NK.shape
    common: dict[str, Any] = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
    if kind == "column":
        made: Any = ColumnParallelLinear(columns, rows, gather_output=False, **common)
    else:
        made = RowParallelLinear(columns, rows, input_is_parallel=True, skip_bias_add=False, **common)
    made.weight.data.copy_(share(weight_NK, CUT[kind]))
    return made


def share(tensor: Tensor, dim: int) -> Tensor:
    """This rank's equal part."""
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()


def own_share(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's share of a whole parameter, cut as Megatron marks it."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    group, dim = parallel_state.get_tensor_model_parallel_group(), parameter.partition_dim
    pieces = whole.chunk(getattr(parameter, "partition_stride", 1), dim)
    return torch.cat([piece.chunk(group.size(), dim)[group.rank()] for piece in pieces], dim)


def random_tokens(config: RunConfig, seed: int = 1) -> Tensor:
    """One sample [1, seq_length + 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.model.vocab_size, (1, config.seq_length + 1), generator=generator)


def drawn(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers that follow from `seed` alone; in every dtype the same, rounded."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)

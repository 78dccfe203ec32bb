"""What every TE call site asks: how a dimension is spread over ranks, and whether the module's settings are covered."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from patches.call_site import context_group, contract, replicated
from patches.contract import DTYPES, UnsupportedError, refuse_first
from patches.ops.sharded import Shards
from patches.registry import attribute

__all__ = ["one_leaf", "refuse_uncovered", "te_attribute", "tokens", "tp_sharded"]

te_attribute = partial(attribute, library="transformer-engine")


def tp_sharded(module: Any) -> Shards:
    """A dimension spread over the module's tensor-parallel ranks."""
    if module.tp_size > 1 and module.tp_group is None:
        raise UnsupportedError(
            f"{_name(module)} has tp_size={module.tp_size} but no tp_group: set_tensor_parallel_group"
        )
    return Shards(contract(), module.tp_group if module.tp_size > 1 else None, context_group())


def tokens(module: Any) -> Shards:
    """Dimension 0 of the module's sequence-parallel side: spread over ranks or whole."""
    return tp_sharded(module) if module.sequence_parallel else replicated()


def one_leaf() -> Shards:
    """A dimension that no tensor-parallel size ever cuts."""
    return replicated().one_leaf()


def refuse_uncovered(module: Any, x: Tensor, parameters: list[Tensor]) -> None:
    """Raise `UnsupportedError` for the first setting of a TE module that the promise does not cover."""
    refuse_first(_uncovered(module, x), f"{_name(module)}: ", " by the patches")
    for parameter in parameters:
        if type(parameter) not in (Tensor, torch.nn.Parameter):
            raise UnsupportedError(f"{_name(module)} has a {type(parameter).__name__} parameter: keep plain ones")
        if parameter.dtype != x.dtype or x.dtype not in DTYPES:
            raise UnsupportedError(
                f"{_name(module)} has {parameter.dtype} parameters and a {x.dtype} input: use bf16 or fp32 for both"
            )
        mark = getattr(parameter, "__fsdp_param__", None)
        if mark is not None:
            raise UnsupportedError(f"{_name(module)}: FSDP is not covered: use Megatron's DistributedDataParallel")


def _uncovered(module: Any, x: Tensor) -> list[tuple[Any, str, str]]:
    from transformer_engine.debug.pytorch.debug_state import TEDebugState
    from transformer_engine.pytorch.cpu_offload import is_cpu_offload_enabled
    from transformer_engine.pytorch.export import is_in_onnx_export_mode
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    overlap = [name for name, value in vars(module).items() if name.startswith("ub_") and value is True]
    store = getattr(module, "wgrad_store", None)
    return [
        (FP8GlobalStateManager.is_fp8_enabled(), "FP8 or FP4 (autocast)", "train in bf16 or fp32"),
        (FP8GlobalStateManager.is_fp8_calibration(), "FP8 calibration", "train in bf16 or fp32"),
        (torch.is_autocast_enabled(x.device.type), "torch.autocast", "make the parameters bf16"),
        (overlap, f"userbuffer overlap ({', '.join(overlap)})", "set tp_comm_overlap=False"),
        (getattr(module, "symmetric_ar_type", None), "symmetric_ar_type", "set it to None"),
        (is_cpu_offload_enabled(), "CPU offload", "set cpu_offloading=False"),
        (store is not None and store.delay_wgrad_compute(), "delay_wgrad_compute", "set it to False"),
        (is_in_onnx_export_mode(), "ONNX export", "call patches.disable() before it"),
        (getattr(module, "fsdp_group", None), "TE's FSDP", "use Megatron's DistributedDataParallel"),
        (TEDebugState.debug_enabled, "TE's debug mode", "switch nvdlfw_inspect off"),
    ]


def _name(module: Any) -> str:
    return f"transformer_engine {type(module).__name__}"

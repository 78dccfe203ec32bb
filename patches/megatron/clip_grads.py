"""megatron.core.optimizer: the gradient norm, hence the clip coefficient, and the number of zeros."""

from __future__ import annotations

import math
from typing import Any

import torch

from patches.contract import UnsupportedError, refuse_first
from patches.megatron.moe.refusals import VERSIONS
from patches.order.backend import training_device
from patches.order.grad_norm import gradient_norm
from patches.registry import attribute

__all__ = ["PATCHES"]

ELEMENTWISE = ("Adam", "AdamW", "FusedAdam", "SGD", "FusedSGD")  # optimizers of torch, Transformer Engine and Apex
STATES = ("exp_avg_dtype", "exp_avg_sq_dtype", "main_params_dtype")  # of TE's, scaled where they are fp16 or fp8


def _get_grad_norm(original: Any) -> Any:
    @torch.no_grad()
    def get_grad_norm_fp32(grads_for_norm: Any, norm_type: float = 2, grad_stats_parallel_group: Any = None) -> float:
        grads = [grads_for_norm] if isinstance(grads_for_norm, torch.Tensor) else list(grads_for_norm)
        if any(type(grad).__name__ == "DTensor" for grad in grads):
            raise UnsupportedError("gradients in DTensors (FSDP) are not covered: use DistributedDataParallel")
        if norm_type == float("inf"):
            return original(grads_for_norm, norm_type, grad_stats_parallel_group)
        if norm_type != 2:
            raise UnsupportedError(f"gradient norm of type {norm_type} is not covered: use 2 or inf")
        return gradient_norm(grads, [grad_stats_parallel_group], training_device())

    return get_grad_norm_fp32


def _chained_norm(original: Any) -> Any:
    @torch.no_grad()
    def get_grad_norm(self: Any) -> float:
        """Of dense parameters and of experts apart, even where one group of ranks has both."""
        if len(self.chained_optimizers) == 1:
            return self.chained_optimizers[0].get_grad_norm()
        norms = [optimizer.get_grad_norm() or 0.0 for optimizer in self.chained_optimizers]
        return math.sqrt(sum(norm * norm for norm in norms))

    return get_grad_norm


def _count_zeros(original: Any) -> Any:
    @torch.no_grad()
    def count_zeros_fp32(
        parameters: Any,
        grad_stats_parallel_group: Any,
        use_decoupled_grad: bool = False,
        tp_group: Any = None,
        expert_tp_group: Any = None,
    ) -> float:
        """Stock's, in integers: float32 ends to count at 2^24."""
        from megatron.core.optimizer.clip_grads import param_is_not_shared, param_is_not_tensor_parallel_duplicate

        group = {} if tp_group is None else {"tp_group": tp_group}
        total = torch.zeros((), dtype=torch.int64, device=training_device())
        for parameter in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
            grad = getattr(parameter, "decoupled_grad" if use_decoupled_grad else "grad", None)
            own = param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, **group)
            if grad is not None and own:
                total += grad.numel() - torch.count_nonzero(grad)
        torch.distributed.all_reduce(total, group=grad_stats_parallel_group)
        return float(total.item())

    return count_zeros_fp32


def _init(original: Any) -> Any:
    def __init__(self: Any, optimizer: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        _refuse(optimizer, config)
        original(self, optimizer, config, *args, **kwargs)

    return __init__


def _refuse(optimizer: Any, config: Any) -> None:
    def is_set(name: str) -> bool:
        return bool(getattr(config, name, False))

    scaled = next((n for n in STATES if getattr(config, n, torch.float32) not in (torch.float32, torch.bfloat16)), "")
    cls = type(optimizer)
    refuse_first(
        (
            (config.optimizer not in ("adam", "sgd"), f"optimizer={config.optimizer!r}", "use adam or sgd"),
            (config.fp16, "fp16 training with loss scaling", "use bf16 or fp32"),
            (
                is_set("optimizer_cpu_offload"),
                "optimizer_cpu_offload=True",
                "what is computed where follows from shards' sizes: set it to False (without --optimizer-cpu-offload)",
            ),
            (
                is_set("overlap_param_gather_with_optimizer_step"),
                "overlap_param_gather_with_optimizer_step=True",
                "the gradient norm is then one of norms of virtual stages: set it to False "
                "(without --overlap-param-gather-with-optimizer-step)",
            ),
            (is_set("optimizer_cuda_graph"), "optimizer_cuda_graph=True", "set it to False"),
            (
                scaled,
                f"{scaled}={getattr(config, scaled, None)}",
                "it is scaled by the largest element of a rank's shard: use torch.float32 "
                f"(without --{scaled.replace('_', '-')})",
            ),
            # Megatron before 0.18 calls the optimizer of a muon run "adam".
            (
                optimizer is not None and cls.__name__ not in ELEMENTWISE,
                f"{cls.__module__}.{cls.__name__}",
                f"use {', '.join(ELEMENTWISE)} (--optimizer adam)",
            ),
        )
    )


def _norm_patch(name: str, module: str) -> Any:
    return attribute(
        name,
        f"megatron.core.optimizer.{module}:get_grad_norm_fp32",
        "sum of squares over all parameters, in an order that follows the shards",
        _get_grad_norm,
        parameters="grads_for_norm norm_type grad_stats_parallel_group",
    )


PATCHES = [
    _norm_patch("gradient-norm", "optimizer"),
    attribute(
        "gradient-norm-of-experts",
        "megatron.core.optimizer.optimizer:ChainedOptimizer.get_grad_norm",
        "two norms are one, or rounded apart, as the distributed optimizer is on or off",
        _chained_norm,
        parameters="",
        versions=VERSIONS,
        order_free=True,
    ),
    attribute(
        "zeros-in-gradient",
        "megatron.core.optimizer.optimizer:count_zeros_fp32",
        "counted in float32, in an order that follows the shards",
        _count_zeros,
        parameters="parameters grad_stats_parallel_group use_decoupled_grad tp_group expert_tp_group",
    ),
    attribute(
        "optimizer-settings",
        "megatron.core.optimizer.optimizer:MegatronOptimizer.__init__",
        "refuses optimizers that are not covered",
        _init,
        parameters="optimizer config init_state_fn",
    ),
]

"""megatron.core.distributed.finalize_model_grads: the all-reduce of gradients that backward has already completed."""

from __future__ import annotations

from typing import Any

from patches.call_site import is_grad_reduced, tp_group
from patches.contract import UnsupportedError
from patches.megatron.first_step import require_agreement
from patches.registry import attribute

__all__ = ["PATCHES"]


def _allreduce(original: Any) -> Any:
    def _allreduce_non_tensor_model_parallel_grads(model: Any, config: Any, tp_group_: Any = None) -> None:
        group = tp_group_ or tp_group()
        if group.size() == 1:
            return
        require_agreement(model, group)
        for chunk in model:
            for setting in ("use_megatron_fsdp", "use_custom_fsdp"):
                if getattr(chunk.ddp_config, setting, False):
                    raise UnsupportedError(f"{setting}=True is not covered: use Megatron's DistributedDataParallel")
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad and _is_partial(name, parameter, config) and not is_grad_reduced(parameter):
                    raise UnsupportedError(
                        f"the gradient of {name} is a partial sum of a module that is not covered: "
                        "build the model after patches.enable(), from Megatron's local or Transformer Engine layer spec"
                    )

    def with_keyword(model: Any, config: Any, tp_group: Any = None) -> None:
        _allreduce_non_tensor_model_parallel_grads(model, config, tp_group)

    return with_keyword


def _is_partial(name: str, parameter: Any, config: Any) -> bool:
    """Whether stock Megatron sums this parameter's gradient over tensor-parallel ranks."""
    return (
        getattr(parameter, "average_gradients_across_tp_domain", False)
        or (config.sequence_parallel and getattr(parameter, "sequence_parallel", False))
        or (config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name))
    )


PATCHES = [
    attribute(
        "finalize-gradients",
        "megatron.core.distributed.finalize_model_grads:_allreduce_non_tensor_model_parallel_grads",
        "norm and bias gradients are complete after backward; partial ones of other modules are refused",
        _allreduce,
        parameters="model config tp_group",
    )
]

"""megatron.core.distributed.finalize_model_grads: the all-reduce of gradients that backward has already completed.

Where sums over the batch have no order, they end here: copies of an embedding on two pipeline stages are added, still
as integers; then all are rounded. Megatron divides them by the batch's tokens next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patches.call_site import is_grad_reduced, tp_group
from patches.contract import UnsupportedError
from patches.megatron.first_step import require_agreement
from patches.megatron.param_and_grad_buffer import round_sums
from patches.ops.sequences import batch_sum
from patches.order.batch_sum import exceeds
from patches.order.grid import LIMIT
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


def _allreduce_embedding(original: Any) -> Any:
    def _allreduce_embedding_grad(
        model: Any, embd_group: Any, pp_group: Any, weight_getter: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Stock's, on the totals of the shared weight."""
        shared = []

        def weight_with_total(module: Any) -> Any:
            weight = weight_getter(module)
            if weight is not None and weight.requires_grad:
                shared.append((weight, weight.main_grad))
                weight.main_grad = batch_sum(weight).total
            return weight

        try:
            original(model, embd_group, pp_group, weight_with_total, *args, **kwargs)
        finally:
            for weight, main_grad in shared:
                weight.main_grad = main_grad

    return _allreduce_embedding_grad


def _allreduce_positions(original: Any) -> Any:
    @torch.no_grad()
    def _allreduce_position_embedding_grads(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        """Stock's, the last sum of all; then the totals are rounded."""
        original(model, config, *args, **kwargs)
        _refuse_inexact(model)
        for chunk in model:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                round_sums(buffer)

    return _allreduce_position_embedding_grads


def _refuse_inexact(model: Any) -> None:
    """Raise `UnsupportedError` on all ranks where a rank's sum may have lost something."""
    from megatron.core import parallel_state

    named = [(name, p) for chunk in model for name, p in chunk.module.named_parameters() if p.requires_grad]
    sums = [batch_sum(parameter) for _, parameter in named]
    # Of every sum: what bounds it, and whether something was left out of it.
    found = torch.stack([torch.stack((s.bound, s.foreign.double())) for s in sums], 1)
    data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
    of_experts = torch.tensor([not getattr(parameter, "allreduce", True) for _, parameter in named])
    for some, group in ((~of_experts, data_parallel), (of_experts, parallel_state.get_expert_data_parallel_group())):
        if some.any():
            part = found[:, some]
            dist.all_reduce(part, group=group)
            found[:, some] = part
    bad = exceeds(found[0]) | found[1].ne(0)
    worst = bad.any().double()
    for group in (data_parallel, parallel_state.get_model_parallel_group()):
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
    if worst.item():
        own = list(_complaints([name for name, _ in named], found, bad))
        raise UnsupportedError(
            "batch='order-free': " + (own or ["another rank's gradient cannot be summed, see there"])[0]
        )


def _complaints(names: list[str], found: Tensor, bad: Tensor) -> Iterator[str]:
    for index in bad.nonzero().flatten().tolist():
        if found[1, index]:
            yield (
                f"the gradient of {names[index]}, or a part of it, is summed by a module that is not covered: build "
                "the model after patches.enable(), from Megatron's local or Transformer Engine layer spec"
            )
        yield (
            f"the gradient of {names[index]}, a sum over the batch's tokens, may be as large as {found[0, index]:.3g} "
            f"and is exact below {LIMIT:.3g} alone: mend what makes it so large or not finite, or scale the loss down "
            "by a power of two (OptimizerConfig.loss_scale, --loss-scale)"
        )


PATCHES = [
    attribute(
        "embedding-copies",
        "megatron.core.distributed.finalize_model_grads:_allreduce_embedding_grad",
        "the gradient of an embedding that two pipeline stages hold is a sum over both",
        _allreduce_embedding,
        parameters="model embd_group pp_group weight_getter skip_if_none config",
        order_free=True,
    ),
    attribute(
        "batch-sums-rounded",
        "megatron.core.distributed.finalize_model_grads:_allreduce_position_embedding_grads",
        "sums over the batch are rounded once, when they are complete",
        _allreduce_positions,
        parameters="model config pos_emb_group pp_group",
        order_free=True,
    ),
    attribute(
        "finalize-gradients",
        "megatron.core.distributed.finalize_model_grads:_allreduce_non_tensor_model_parallel_grads",
        "norm and bias gradients are complete after backward; partial ones of other modules are refused",
        _allreduce,
        parameters="model config tp_group",
    ),
]

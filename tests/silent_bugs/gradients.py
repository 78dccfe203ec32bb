"""Bugs in what happens to parameters' gradients: reductions over ranks, accumulation, scale, norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core import tensor_parallel as mcore_tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
from megatron.core.optimizer import optimizer
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from tests.silent_bugs.case import DP2, FINALIZE, GPT2, SP2, TIGHT, TP2, around, bug
from tests.support.traces import replaced


def finalizing_with(**changes: Any) -> Any:
    """The reduction of replicated parameters' gradients over TP, told another configuration."""

    def wrap(reduce: Callable[..., None]) -> Callable[..., None]:
        def misled(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            config = copy.copy(config)
            for name, value in changes.items():
                setattr(config, name, value)
            reduce(model, config, *args, **kwargs)

        return misled

    return around(FINALIZE, "_allreduce_non_tensor_model_parallel_grads", wrap)


@bug("grad *layernorm.weight", layout=SP2, source="https://github.com/NVIDIA/Megatron-LM/issues/1446")
def norm_gradients_not_reduced_over_the_sequence() -> Iterator[None]:
    """Under sequence parallelism a norm's gradient is each rank's sum over its own tokens."""
    with finalizing_with(sequence_parallel=False):
        yield


@bug(
    "grad *.q_layernorm.weight", "grad *.k_layernorm.weight", layout=TP2,
    source="https://github.com/NVIDIA-NeMo/RL/issues/3716",
)  # fmt: skip
def query_and_key_norm_gradients_not_reduced() -> Iterator[None]:
    """The gradient of the queries' and keys' norms is each rank's sum over its own heads."""
    with finalizing_with(qk_layernorm=False):
        yield


@bug(
    "grad *.bias", layout=SP2, model=GPT2, source="https://github.com/bigcode-project/Megatron-LM/issues/11",
)  # fmt: skip
def row_parallel_bias_gradient_not_reduced() -> Iterator[None]:
    """Under sequence parallelism the gradient of a row-parallel bias is each rank's sum over its own tokens."""

    def wrap(reduce: Callable[..., None]) -> Callable[..., None]:
        def without_biases(model: Any, *args: Any, **kwargs: Any) -> None:
            named = [(name, p) for chunk in model for name, p in chunk.named_parameters()]
            biases = [p for name, p in named if name.endswith(("linear_proj.bias", "linear_fc2.bias"))]
            for bias in biases:
                bias.sequence_parallel = False
            reduce(model, *args, **kwargs)
            for bias in biases:
                bias.sequence_parallel = True

        return without_biases

    with around(FINALIZE, "_allreduce_non_tensor_model_parallel_grads", wrap):
        yield


@bug("grad *_layernorm.weight", layout=TP2, source="https://github.com/NVIDIA/Megatron-LM/issues/1528")
def whole_norm_gradients_summed_over_ranks() -> Iterator[None]:
    """Without sequence parallelism every rank has a norm's whole gradient; summing it makes it TP times too large."""

    def wrap(reduce: Callable[..., None]) -> Callable[..., None]:
        def too_much(model: Any, *args: Any, **kwargs: Any) -> None:
            reduce(model, *args, **kwargs)
            for name, p in model[0].named_parameters():
                if "input_layernorm" in name or "pre_mlp_layernorm" in name:
                    torch.distributed.all_reduce(p.main_grad, group=parallel_state.get_tensor_model_parallel_group())

        return too_much

    with around(FINALIZE, "_allreduce_non_tensor_model_parallel_grads", wrap):
        yield


@bug("grad *", layout=DP2, source="https://github.com/NVIDIA/Megatron-LM/issues/1685")
def gradients_not_reduced_over_data_parallel_ranks() -> Iterator[None]:
    """Every data-parallel rank updates with the gradient of its own samples."""
    with replaced(BucketGroup, "start_grad_sync", lambda self, *args, **kwargs: None):
        yield


@bug("grad *", layout=DP2, source="https://github.com/pytorch/pytorch/issues/36516")
def gradients_summed_not_averaged_over_data_parallel_ranks() -> Iterator[None]:
    """The sum over data-parallel ranks is not divided by their number."""

    def wrap(start: Callable[..., None]) -> Callable[..., None]:
        def unscaled(self: Any, *args: Any, **kwargs: Any) -> None:
            for bucket in self.buckets:
                bucket.gradient_scaling_factor = 1.0
            start(self, *args, **kwargs)

        return unscaled

    with around(BucketGroup, "start_grad_sync", wrap):
        yield


@bug(
    "loss model", layout=TP2, micro_batch_size=1,
    source="https://github.com/karpathy/nanoGPT/issues/206",
)  # fmt: skip
def loss_not_divided_by_microbatches() -> Iterator[None]:
    """Gradients accumulate over microbatches whose loss has not been divided by their number."""

    def wrap(calculate: Callable[..., Any]) -> Callable[..., Any]:
        def undivided(
            model: Any, output: Any, loss: Any, config: Any, stage: Any, collect: Any, n: int, *rest: Any
        ) -> Any:
            return calculate(model, output, loss, config, stage, collect, 1, *rest)

        return undivided

    with around(schedules, "forward_step_calc_loss", wrap):
        yield


@bug("grad *", layout=TP2, source="https://github.com/NVIDIA/Megatron-LM/pull/4609")
def main_gradients_of_the_last_step_not_zeroed() -> Iterator[None]:
    """Gradients accumulate on top of what the step before has left in their buffers."""

    def wrap(zero: Callable[..., None]) -> Callable[..., None]:
        def keep(self: Any) -> None:
            left = [buffer.grad_data.clone() for buffer in self.buffers]
            zero(self)
            for buffer, data in zip(self.buffers, left, strict=True):
                buffer.grad_data.copy_(data)

        return keep

    with around(DistributedDataParallel, "zero_grad_buffer", wrap):
        yield


def accumulating(change: Callable[[Any], None], before: bool) -> Any:
    """`change(parameter)` before or after every addition of a microbatch's gradient to its main gradient."""

    def wrap(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(self: Any, parameter: Any) -> Callable[..., None]:
            hook = make(self, parameter)

            def changed(*unused: Any) -> None:
                if before:
                    change(parameter)
                hook(*unused)
                if not before:
                    change(parameter)

            return changed

        return made

    return around(DistributedDataParallel, "_make_backward_post_hook", wrap)


@bug("grad *.mlp.linear_fc2.weight", layout=TP2)
def microbatch_overwrites_the_one_before() -> Iterator[None]:
    """Of the MLP's second weight only the last microbatch's gradient is left: it is stored, not added."""

    def overwrite(parameter: Any) -> None:
        if tuple(parameter.shape) == (64, 36):  # [hidden size, feed-forward size / 2]
            parameter.main_grad.zero_()

    with accumulating(overwrite, before=True):
        yield


@bug("grad *", layout=TP2, dtype="fp32", source="https://github.com/NVIDIA/Megatron-LM/pull/6624")
def gradients_of_an_fp32_run_accumulated_in_bf16() -> Iterator[None]:
    """Main gradients are rounded to bf16 at every microbatch."""

    def coarse(parameter: Any) -> None:
        parameter.main_grad.copy_(parameter.main_grad.bfloat16())

    with accumulating(coarse, before=False):
        yield


@bug("settings grad_reduce_in_fp32", layout=TP2, source="https://github.com/NVIDIA/Megatron-LM/issues/502")
def gradient_buffers_in_bf16() -> Iterator[None]:
    """Gradients of a bf16 run accumulate in bf16 where float32 was asked for."""

    def wrap(init: Callable[..., None]) -> Callable[..., None]:
        def coarse(self: Any, config: Any, ddp_config: Any, *args: Any, **kwargs: Any) -> None:
            ddp_config.grad_reduce_in_fp32 = False
            init(self, config, ddp_config, *args, **kwargs)

        return coarse

    with around(DistributedDataParallel, "__init__", wrap):
        yield


@bug(
    "clip gradient norm", layout=TP2, optimizer=TIGHT,
    source="https://github.com/meta-pytorch/torchtune/issues/2420",
)  # fmt: skip
def clipping_by_the_ranks_own_norm() -> Iterator[None]:
    """The gradient norm is taken over the rank's own shards: every rank clips by another coefficient."""

    def own(grads: list[Tensor], *args: Any, **kwargs: Any) -> float:
        return float(torch.stack([grad.norm() for grad in grads]).norm())

    with replaced(optimizer, "get_grad_norm_fp32", own):
        yield


@bug(
    "clip gradient norm", layout=TP2, optimizer=TIGHT, dtype="fp32", model=GPT2,
    source="https://github.com/ROCm/TransformerEngine/pull/715",
)  # fmt: skip
def norm_counts_replicated_parameters_on_every_rank() -> Iterator[None]:
    """Gradients that all ranks hold enter the gradient norm TP times, so that clipping is too strong."""
    with replaced(mcore_tensor_parallel, "param_is_not_tensor_parallel_duplicate", lambda *args, **kwargs: True):
        yield

"""megatron.core.distributed.param_and_grad_buffer: the data-parallel sum, whose order must not follow an element's
place in a bucket, since TP moves it."""

from __future__ import annotations

from typing import Any

import torch

from patches.contract import UnsupportedError
from patches.order.collectives import tree_all_reduce, tree_reduce_scatter
from patches.registry import attribute

__all__ = ["PATCHES"]


class _Done:
    """The handle that Megatron waits for; the sum is done by then."""

    def wait(self) -> None:
        pass


def _start_grad_sync(original: Any) -> Any:
    def start_grad_sync(self: Any, force_all_reduce: bool | None = False) -> None:
        """Sum every bucket over the data-parallel ranks by the pairwise tree in rank order, in float32."""
        config = self.ddp_config
        if getattr(self, "is_first_batch", False) and self.grad_reduce_handle is not None:
            return
        if config.num_distributed_optimizer_instances > 1:
            raise UnsupportedError("num_distributed_optimizer_instances > 1 is not covered: use 1")
        for bucket in self.buckets:  # gradients that 0.17 and later accumulate outside the buffer
            for parameter in getattr(bucket, "params_with_extra_main_grads", ()):
                if getattr(parameter, "main_grad_copy_in_grad_buffer", None) is not None:
                    parameter.main_grad_copy_in_grad_buffer.copy_(parameter.main_grad)
        if config.check_for_nan_in_grad or config.check_for_large_grads:
            self.check_grads(
                check_for_nan_or_inf=config.check_for_nan_in_grad, check_for_large=config.check_for_large_grads
            )
        scatter = config.use_distributed_optimizer and not force_all_reduce
        group = (
            self.intra_distributed_optimizer_instance_group
            if config.use_distributed_optimizer
            else self.data_parallel_group
        )
        divide_by = group.size() if config.average_in_collective else 1
        for bucket in self.buckets:
            grads = bucket.grad_data
            if bucket.gradient_scaling_factor != 1.0:
                grads *= bucket.gradient_scaling_factor
            if group.size() == 1:
                continue
            if scatter:
                own = tree_reduce_scatter(grads.float(), group, grads.dtype, divide_by)
                grads.chunk(group.size())[group.rank()].copy_(own)
            else:
                grads.copy_(tree_all_reduce(grads.float(), group, grads.dtype, divide_by))
        self.grad_reduce_handle = _Done() if config.overlap_grad_reduce else None

    return torch.no_grad()(start_grad_sync)


PATCHES = [
    attribute(
        "data-parallel-sum",
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",
        "a ring's order of summation follows the element's place in the bucket, which TP moves",
        _start_grad_sync,
        parameters="force_all_reduce",
    )
]

"""megatron.core.distributed.param_and_grad_buffer: sums over micro-batches and data-parallel ranks.

In order: their order must not follow an element's place in a bucket, since TP moves it. Order-free: they are integers.

    bytes of a buffer of n elements     0 ────────── 4n ────────── 8n
    while gradients are summed          int64 totals of all parameters, and of no order
    once they are rounded               float32, main_grad    unused
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patches.call_site import contract
from patches.contract import UnsupportedError
from patches.ops.sequences import ATTRIBUTE
from patches.order.batch_sum import BatchSum, round_into
from patches.order.collectives import tree_all_reduce, tree_reduce_scatter
from patches.registry import attribute

__all__ = ["PATCHES", "round_sums"]

MODULE = "megatron.core.distributed.param_and_grad_buffer"
TOTALS = "_patches_totals"  # of a buffer and of each of its buckets: int64, as long as its grad_data


@dataclass(frozen=True)
class _Works:
    """The handle that Megatron waits for."""

    works: Sequence[dist.Work] = ()

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _start_grad_sync(original: Any) -> Any:
    def start_grad_sync(self: Any, force_all_reduce: bool | None = False) -> None:
        """Sum every bucket over the data-parallel ranks: integers, or by the tree in rank order, in float32."""
        config = self.ddp_config
        if getattr(self, "is_first_batch", False) and self.grad_reduce_handle is not None:
            return
        if config.num_distributed_optimizer_instances > 1:
            raise UnsupportedError("num_distributed_optimizer_instances > 1 is not covered: use 1")
        scatter = config.use_distributed_optimizer and not force_all_reduce
        group = (
            self.intra_distributed_optimizer_instance_group
            if config.use_distributed_optimizer
            else self.data_parallel_group
        )
        works = _add_totals(self, group, scatter) if contract().order_free else _add_by_tree(self, group, scatter)
        if not config.overlap_grad_reduce:
            works.wait()
        self.grad_reduce_handle = works if config.overlap_grad_reduce else None

    return torch.no_grad()(start_grad_sync)


def _add_by_tree(self: Any, group: dist.ProcessGroup, scatter: bool) -> _Works:
    config = self.ddp_config
    for bucket in self.buckets:  # gradients that 0.17 and later accumulate outside the buffer
        for parameter in getattr(bucket, "params_with_extra_main_grads", ()):
            if getattr(parameter, "main_grad_copy_in_grad_buffer", None) is not None:
                parameter.main_grad_copy_in_grad_buffer.copy_(parameter.main_grad)
    if config.check_for_nan_in_grad or config.check_for_large_grads:
        self.check_grads(
            check_for_nan_or_inf=config.check_for_nan_in_grad, check_for_large=config.check_for_large_grads
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
    return _Works()


def _add_totals(self: Any, group: dist.ProcessGroup, scatter: bool) -> _Works:
    if group.size() == 1:
        return _Works()
    works = []
    for bucket in self.buckets:
        totals: Tensor = getattr(bucket, TOTALS)
        if scatter:
            own = totals.chunk(group.size())[group.rank()]
            works.append(dist.reduce_scatter_tensor(own, totals, group=group, async_op=True))
        else:
            works.append(dist.all_reduce(totals, group=group, async_op=True))
    return _Works(works)


def _init(original: Any) -> Any:
    def __init__(self: Any, ddp_config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(ddp_config, "nccl_ub", False):
            raise UnsupportedError("nccl_ub=True is not covered by batch='order-free': set it to False")
        original(self, ddp_config, *args, **kwargs)
        if getattr(self, "extra_main_grads", None):
            raise UnsupportedError(
                "gradients that are accumulated outside of Megatron's buffer are not covered by batch='order-free': "
                "set grad_reduce_in_fp32=True"
            )
        _lay_out(self)

    return __init__


def _lay_out(buffer: Any) -> None:
    """Put totals into the memory of gradients."""
    totals = torch.zeros(buffer.numel, dtype=torch.int64, device=buffer.grad_data.device)
    grads = [parameter.main_grad for parameter in buffer.param_index_map]
    for view in (buffer.grad_data, *grads, *(bucket.grad_data for bucket in buffer.buckets)):
        view.set_(totals.untyped_storage(), view.storage_offset(), view.size(), view.stride())
    setattr(buffer, TOTALS, totals)
    for bucket in buffer.buckets:
        setattr(bucket, TOTALS, totals[bucket.offset : bucket.offset + bucket.grad_data.numel()])
    for parameter, (start, end, _) in buffer.param_index_map.items():
        setattr(parameter, ATTRIBUTE, BatchSum.of(totals[start:end].view(parameter.main_grad.shape)))


def _reset(original: Any) -> Any:
    def reset(self: Any) -> None:
        original(self)
        getattr(self, TOTALS).zero_()
        for parameter in self.param_index_map:
            getattr(parameter, ATTRIBUTE).reset()

    return reset


def round_sums(buffer: Any) -> None:
    """Round the totals of a `_ParamAndGradBuffer` to its `grad_data`."""
    round_into(buffer.grad_data, getattr(buffer, TOTALS))
    for parameter in buffer.param_index_map:
        getattr(parameter, ATTRIBUTE).rounded = True


BUFFER_PARAMETERS = (
    "ddp_config param_dtype grad_dtype params params_with_names data_parallel_group bucket_size param_to_name "
    "gradient_scaling_factor param_indices nccl_ub pg_collection param_layout"
)

PATCHES = [
    attribute(
        "data-parallel-sum",
        f"{MODULE}:_ParamAndGradBucketGroup.start_grad_sync",
        "a ring's order of summation follows the element's place in the bucket, which TP moves",
        _start_grad_sync,
        parameters="force_all_reduce",
    ),
    attribute(
        "batch-sums",
        f"{MODULE}:_ParamAndGradBuffer.__init__",
        "sequences are summed exactly: int64 in place of float32",
        _init,
        parameters=BUFFER_PARAMETERS,
        order_free=True,
    ),
    attribute(
        "batch-sums-reset",
        f"{MODULE}:_ParamAndGradBuffer.reset",
        "they begin at zero",
        _reset,
        parameters="",
        order_free=True,
    ),
]

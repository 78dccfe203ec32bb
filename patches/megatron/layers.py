"""megatron.core.tensor_parallel.layers: the linear layers and the embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.call_site import contract, mark_grad_reduced, replicated, tp_group, tp_sharded
from patches.contract import UnsupportedError, refuse_first
from patches.experts import expert_products
from patches.ops.bias import bias_per_token
from patches.ops.embedding import embedding
from patches.ops.linear import GradSink, column_parallel, row_parallel
from patches.order.backend import backend
from patches.registry import attribute

__all__ = ["PATCHES"]

MODULE = "megatron.core.tensor_parallel.layers"


def _row_forward(original: Any) -> Any:
    def forward(self: Any, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        _refuse_autocast(input_)
        if self.is_expert:
            return expert_products(self, input_, [self.weight]), None
        group = tp_group(self)
        if not self.input_is_parallel:
            from megatron.core.tensor_parallel.mappings import scatter_to_tensor_model_parallel_region

            input_ = scatter_to_tensor_model_parallel_region(input_, group=group)
        shards, sp = tp_sharded(group), self.sequence_parallel
        y = row_parallel(input_, self.weight, shards, sp, _sink(self.gradient_accumulation_fusion, self.weight))
        if self.bias is None:
            return y, None
        mark_grad_reduced(self.bias)
        bias = bias_per_token(self.bias, y.shape, shards if sp else replicated())
        return (y, bias) if self.skip_bias_add else (y + bias, None)

    return forward


def _column_forward_impl(original: Any) -> Any:
    def _forward_impl(self: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _refuse_autocast(input)
        if self.is_expert:
            return expert_products(self, input, [weight])
        group = tp_group(self)
        sp = kwargs["sequence_parallel"]
        if group.size() > 1 and not (sp or kwargs["allreduce_dgrad"]):
            raise UnsupportedError("ColumnParallelLinear(disable_grad_reduce=True) is not covered: leave it False")
        if kwargs.get("grad_output_buffer") is not None:
            raise UnsupportedError("defer_embedding_wgrad_compute=True is not covered: leave it False")
        return column_parallel(
            input,
            weight,
            kwargs["bias"],
            tp_sharded(group),
            sp,
            _sink(kwargs["gradient_accumulation_fusion"], weight),
            getattr(weight, "partition_stride", 1),
        )

    return _forward_impl


def _column_forward(original: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """A bias that the caller adds has a gradient per sequence, too."""
        y, bias = original(self, *args, **kwargs)
        return y, bias if bias is None else bias_per_token(bias, y.shape, replicated().one_leaf())

    return forward


def _embedding_forward(original: Any) -> Any:
    def forward(self: Any, input_: Tensor) -> Tensor:
        if backend(self.weight.device).embedding_gradient is None and not contract().order_free:
            return original(self, input_)
        from megatron.core.tensor_parallel import mappings

        if getattr(self, "gtp_remat_size", 1) > 1:
            raise UnsupportedError("an embedding spread over more than tensor-parallel ranks (GTP) is not covered")
        group = tp_group(self)
        partial = embedding(self.weight, input_, tp_sharded(group))
        if self.reduce_scatter_embeddings:
            partial = partial.transpose(0, 1).contiguous()
            return mappings.reduce_scatter_to_sequence_parallel_region(partial, group=group)
        return mappings.reduce_from_tensor_model_parallel_region(partial, group=group)

    return forward


def _refuse_autocast(x: Tensor) -> None:
    way_out = "make the parameters bf16 (--bf16), with enable_autocast=False"
    refuse_first([(torch.is_autocast_enabled(x.device.type), "torch.autocast", way_out)])


def _sink(gradient_accumulation_fusion: bool, weight: Tensor) -> GradSink:
    return GradSink(main_grad=gradient_accumulation_fusion and hasattr(weight, "main_grad"))


PATCHES = [
    attribute(
        "row-parallel",
        f"{MODULE}:RowParallelLinear.forward",
        "sum over input features spread over ranks; bias gradient over tokens",
        _row_forward,
        parameters="input_",
    ),
    attribute(
        "column-parallel",
        f"{MODULE}:ColumnParallelLinear._forward_impl",
        "dgrad sums over output features spread over ranks (QKV, fc1, output layer)",
        _column_forward_impl,
        parameters="input weight args kwargs",
    ),
    attribute(
        "column-bias",
        f"{MODULE}:ColumnParallelLinear.forward",
        "the gradient of a bias that is returned sums over the sequences of a micro-batch",
        _column_forward,
        parameters="input_ weight runtime_gather_output",
        order_free=True,
    ),
    attribute(
        "embedding",
        f"{MODULE}:VocabParallelEmbedding.forward",
        "on a GPU, the order of a row's gradient depends on the rank's other tokens; a CPU adds in token order",
        _embedding_forward,
        parameters="input_",
    ),
    attribute(
        "wgrad-fusion",
        f"{MODULE}:_grad_accum_fusion_available",
        "our wgrad adds into main_grad itself and needs no APEX",
        lambda original: True,
    ),
]

"""Bugs that make activations' gradients wrong, or those of single layers' weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor

from tests.silent_bugs.case import OUTPUT_LAYER_ROWS, QWEN3, SP2, TP2, around, bug, during, tp_rank, tp_size
from tests.support.traces import replaced

LINEAR = layers.LinearWithGradAccumulationAndAsyncCommunication


class Done:
    """Stands for a collective that has ended."""

    def wait(self) -> None: ...


@bug("din output_layer", layout=TP2, source="https://github.com/NovaSky-AI/SkyRL/pull/1886")
def output_layer_input_gradient_not_reduced() -> Iterator[None]:
    """The gradient that the output layer hands down is each rank's share of the vocabulary only."""

    def wrap(backward: Any) -> Any:
        def partial(ctx: Any, grad: Tensor) -> Any:
            ctx.allreduce_dgrad = ctx.allreduce_dgrad and ctx.saved_tensors[1].shape[0] != OUTPUT_LAYER_ROWS
            return backward(ctx, grad)

        return partial

    with around(LINEAR, "backward", wrap):
        yield


@bug("din *.linear_qkv", layout=TP2, dtype="fp32")
def qkv_input_gradient_reduced_twice() -> Iterator[None]:
    """The gradient of the QKV layer's input is summed over the ranks once more."""

    def wrap(backward: Any) -> Any:
        def doubled(ctx: Any, grad: Tensor) -> Any:
            grads = backward(ctx, grad)
            if ctx.saved_tensors[1].shape[0] == 96:  # three times a hidden size of 64, at TP=2
                torch.distributed.all_reduce(grads[0], group=parallel_state.get_tensor_model_parallel_group())
            return grads

        return doubled

    with around(LINEAR, "backward", wrap):
        yield


@bug("din output_layer", layout=SP2)
def input_gradient_scattered_without_the_sum() -> Iterator[None]:
    """Under sequence parallelism a rank keeps its rows of its own partial gradient: the reduction is missing."""

    def scatter(out: Tensor, x: Tensor, group: Any = None, async_op: bool = False) -> Done:
        out.copy_(x.chunk(group.size())[group.rank()])
        return Done()

    with replaced(layers, "dist_reduce_scatter_func", scatter):
        yield


@bug("din *.linear_fc2", layout=TP2, source="https://github.com/Dao-AILab/flash-attention/issues/1244")
def all_reduce_sums_its_gradient_too() -> Iterator[None]:
    """The backward of the forward's all-reduce is an all-reduce, where every rank has the whole gradient already."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        torch.distributed.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        return grad, None

    with replaced(mappings._ReduceFromModelParallelRegion, "backward", staticmethod(backward)):
        yield


@bug("grad *.linear_qkv.weight", "grad *.linear_fc1.weight", layout=SP2)
def weight_gradient_misses_other_sequence_shards() -> Iterator[None]:
    """Column-parallel weights get the gradient of the rank's own tokens alone."""

    def own(out: Tensor, x: Tensor, group: Any = None, async_op: bool = False) -> Done:
        out.zero_()
        out.chunk(tp_size())[tp_rank()].copy_(x)
        return Done()

    with during(LINEAR, "backward", layers, "dist_all_gather_func", own):
        yield


@bug(
    "grad embedding.word_embeddings.weight", layout=TP2, model={**QWEN3, "tied": True},
    source="https://github.com/NVIDIA/Megatron-LM/issues/844",
)  # fmt: skip
def tied_output_gradient_lost() -> Iterator[None]:
    """The embedding's gradient lacks what comes through the output layer that shares its weight."""

    def wrap(weight: Any) -> Any:
        return lambda self: weight(self).detach()

    with around(GPTModel, "shared_embedding_or_output_weight", wrap):
        yield


@bug(
    "dout *.linear_qkv", "din *.linear_qkv", layout={"tp": 4}, model={**QWEN3, "num_query_groups": 2},
    source="https://github.com/bigcode-project/Megatron-LM/pull/37",
)  # fmt: skip
def shared_key_gradients_not_reduced() -> Iterator[None]:
    """Where ranks share a key-value group, each takes the gradient from its own query heads for the group's."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return mappings._split_along_last_dim(grad, ctx.group), None

    with replaced(mappings._AllGatherFromTensorParallelRegion, "backward", staticmethod(backward)):
        yield

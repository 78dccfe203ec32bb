"""Gradients of parameters under `batch="order-free"`: one contribution per batch leaf, added where no order counts.

    [s, b, …]   activations of a micro-batch: dimension 1 tells its sequences apart, dimension 0 is their chunks

A batch leaf is a chunk of one sequence; the contract says how many a sequence has, one by default.

Backward adds contributions to the parameter's `BatchSum` itself and gives autograd zeros, on which Megatron's hooks
run; a gradient that reaches the parameter in another way is thereby told apart from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from patches.contract import UnsupportedError
from patches.order.batch_sum import BatchSum

__all__ = ["ATTRIBUTE", "add_leaves", "added", "batch_leaves", "batch_sum", "in_chunks"]

ATTRIBUTE = "_patches_batch_sum"


def batch_sum(parameter: Any) -> BatchSum:
    """Where the gradient of `parameter` is summed.

    Raises:
        UnsupportedError: nowhere; it is none of the parameters of a model in Megatron's DDP, or its sum is complete.
    """
    found: BatchSum | None = getattr(parameter, ATTRIBUTE, None)
    if found is None:
        raise UnsupportedError(
            f"batch='order-free': nothing sums the gradient of a {type(parameter).__name__} of shape "
            f"{list(parameter.shape)}: wrap the model in Megatron's DistributedDataParallel after patches.enable(), "
            "and give layers whole parameters"
        )
    if found.rounded:
        raise UnsupportedError(
            f"batch='order-free': a gradient of a {type(parameter).__name__} of shape {list(parameter.shape)} came "
            "after the batch's sums had been rounded: call zero_grad_buffer() before every call of Megatron's forward "
            "and backward, and give one call all micro-batches of a step"
        )
    return found


def in_chunks(x: Tensor, chunks: int) -> Tensor:
    """Activations [s, b, …] as [chunks, s/chunks, b, …].

    Raises:
        UnsupportedError: dimension 1 cannot be the sequences of a micro-batch, or they have no such chunks.
    """
    if x.dim() < 3:
        raise UnsupportedError(
            f"batch='order-free': a layer's activations of shape {list(x.shape)} don't tell sequences apart: give it "
            "[s, b, h], as Megatron does"
        )
    if x.shape[0] % chunks:
        raise UnsupportedError(
            f"{x.shape[0]} tokens of a sequence on a rank cannot be cut into its {chunks} chunks: make the sequence's "
            "length a multiple of chunks, and of the ranks that share it"
        )
    return x.unflatten(0, (chunks, -1))


def batch_leaves(x: Tensor, chunks: int) -> list[Tensor]:
    """The batch leaves [s/chunks, …] of activations [s, b, …], chunk by chunk."""
    return [leaf for chunk in in_chunks(x, chunks).unbind() for leaf in chunk.unbind(1)]


def add_leaves(parameter: Any, contributions: Iterable[Tensor]) -> Tensor:
    """Add float32 tensors in the parameter's shape, one a batch leaf; what to give autograd."""
    total = batch_sum(parameter)
    for contribution in contributions:
        total.add(contribution.view(total.total.shape))
    return added(parameter)


def added(parameter: Any) -> Tensor:
    """Zeros in place of a gradient that has been added; tells Megatron so."""
    parameter.grad_added_to_main_grad = True
    return torch.zeros_like(parameter)

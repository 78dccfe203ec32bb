"""The linear part of TE's modules: a row-, column- or not parallel product with its bias."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from patches.call_site import contract, mark_grad_reduced
from patches.contract import UnsupportedError
from patches.ops.bias import bias_per_token
from patches.ops.linear import GradSink, column_parallel, row_parallel
from patches.te.context import one_leaf, tokens, tp_sharded

__all__ = ["bias_to_return", "pieces_of", "product"]


def product(
    module: Any, mode: str | None, x: Tensor, weight: Tensor, bias: Tensor | None, pieces: int, first: bool | None
) -> Tensor:
    """y = x·weightᵀ + bias.

    Args:
        module: the TE module; says how ranks share the weight and where its gradient goes.
        mode: "row", "column" or None.
        pieces: of a column-parallel weight, see `pieces_of`.
        first: TE's `is_first_microbatch`; True overwrites `main_grad`.
    """
    sink = GradSink(
        main_grad=module.fuse_wgrad_accumulation and hasattr(weight, "main_grad"),
        overwrite=bool(first) or getattr(weight, "overwrite_main_grad", False),
    )
    if mode == "row":
        y = row_parallel(x, weight, tp_sharded(module), module.sequence_parallel, sink)
        return y if bias is None else y + bias_to_return(module, mode, bias, y)
    sp = mode == "column" and module.sequence_parallel
    shards = tp_sharded(module) if mode == "column" else one_leaf()
    return column_parallel(x, weight, bias, shards, sp, sink, pieces)


def bias_to_return(module: Any, mode: str | None, bias: Tensor, y: Tensor) -> Tensor:
    """`bias`, to be added to `y` here or by the caller, with its gradient's sum over tokens in the contract's order."""
    if mode != "row":
        return bias_per_token(bias, y.shape, one_leaf()) if contract().order_free else bias
    mark_grad_reduced(cast(torch.nn.Parameter, bias))
    return bias_per_token(bias, y.shape, tokens(module))


def pieces_of(weights: list[Tensor]) -> int:
    """How many equal pieces, each spread over all ranks, a rank's column-parallel weight is made of.

    rank r holds [gate_r | up_r]: one weight with partition_stride=2, or two weights (TE's `parameters_split`).
    """
    if len({weight.shape[0] for weight in weights}) > 1:
        raise UnsupportedError("parameters_split into unequal sizes is not covered: use one weight, or equal sizes")
    return len(weights) * getattr(weights[0], "partition_stride", 1)

"""megatron.core.tensor_parallel.cross_entropy and fusions.fused_cross_entropy: the sum of exponentials."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.call_site import tp_sharded
from patches.contract import UnsupportedError
from patches.ops.cross_entropy import cross_entropy
from patches.registry import attribute

__all__ = ["PATCHES"]


class _CrossEntropy:
    """Stands for Megatron's autograd function; its callers use `apply` alone."""

    @staticmethod
    def apply(logits: Tensor, target: Tensor, label_smoothing: float = 0.0, tp_group: Any = None) -> Tensor:
        if label_smoothing:
            raise UnsupportedError(f"label_smoothing={label_smoothing} is not covered: set it to 0")
        return cross_entropy(logits, target, tp_sharded(tp_group))


class _FusedCrossEntropy:
    @staticmethod
    def apply(logits: Tensor, target: Tensor, tp_group: Any) -> Tensor:
        return cross_entropy(logits, target, tp_sharded(tp_group))


PATCHES = [
    attribute(
        "cross-entropy",
        "megatron.core.tensor_parallel.cross_entropy:_VocabParallelCrossEntropy",
        "sum of exponentials over the vocabulary, spread over ranks",
        lambda original: _CrossEntropy,
    ),
    attribute(
        "fused-cross-entropy",
        "megatron.core.fusions.fused_cross_entropy:_VocabParallelCrossEntropy",
        "the same sum when cross_entropy_loss_fusion is on",
        lambda original: _FusedCrossEntropy,
    ),
]

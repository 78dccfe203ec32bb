"""megatron.core.models.common.embeddings.language_model_embedding: embeddings of positions and token types.

They are torch's own, whose gradient autograd sums over a micro-batch; TP does not cut them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.call_site import replicated
from patches.ops.embedding import embedding
from patches.registry import REGISTRY, attribute

__all__ = ["PATCHES"]


class _Embedding(torch.nn.Embedding):
    """Torch's, with a gradient that has no order; after `patches.disable()` it is torch's own again."""

    def forward(self, input: Tensor) -> Tensor:
        if REGISTRY.contract is None:
            return super().forward(input)
        return embedding(self.weight, input, replicated())


def _init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for module in self.children():
            if type(module) is torch.nn.Embedding:
                module.__class__ = _Embedding

    return __init__


PATCHES = [
    attribute(
        "position-embedding",
        "megatron.core.models.common.embeddings.language_model_embedding:LanguageModelEmbedding.__init__",
        "the gradient of positions sums over the sequences of a micro-batch",
        _init,
        order_free=True,
    )
]

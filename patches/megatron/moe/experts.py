"""megatron.core.transformer.moe.experts: MLPs of one expert each, or one of all of a rank's (`patches.experts`)."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from patches.contract import UnsupportedError
from patches.experts import give_weights
from patches.megatron.moe.refusals import VERSIONS
from patches.registry import attribute

__all__ = ["PATCHES"]


def _mlp_forward(original: Any) -> Any:
    def forward(self: Any, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        if per_token_scale is not None:
            give_weights(self.linear_fc2, per_token_scale)
        return original(self, hidden_states, None, **kwargs)

    return forward


def _grouped_forward(original: Any) -> Any:
    def forward(
        self: Any,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
        output_buffer: Tensor | None = None,
        grad_input_buffer: Tensor | None = None,
    ) -> Any:
        """That of one MLP, in which each layer knows its experts' rows: an activation does not ask whose they are."""
        from megatron.core.transformer.mlp import MLP

        if output_buffer is not None or grad_input_buffer is not None:
            raise UnsupportedError("experts that write into given buffers (moe_ncclep_zero_copy) are not covered")
        sizes = tokens_per_expert.tolist()
        mlp: Any = SimpleNamespace(
            config=self.config,
            activation_func=self.activation_func,
            linear_fc1=_OfRows(self.linear_fc1, sizes),
            linear_fc2=_OfRows(self.linear_fc2, sizes),
        )
        give_weights(self.linear_fc2, permuted_probs)
        return MLP.forward(mlp, permuted_local_hidden_states)

    return forward


class _OfRows(torch.nn.Module):
    """A layer of all experts that knows how many rows each has: a module, as MLPs from 0.17 on want theirs to be."""

    def __init__(self, layer: Any, sizes: list[int]) -> None:
        super().__init__()
        self.call = partial(layer, m_splits=sizes)  # no submodule

    def forward(self, x: Tensor) -> Any:
        return self.call(x)


PATCHES = [
    attribute(
        "expert-weights",
        "megatron.core.transformer.mlp:MLP.forward",
        "the gradient of a router's weight sums over an expert's width, which ETP spreads over ranks",
        _mlp_forward,
        parameters="hidden_states per_token_scale kwargs",
        versions=VERSIONS,
        order_free=True,
    ),
    attribute(
        "grouped-expert-weights",
        "megatron.core.transformer.moe.experts:TEGroupedMLP.forward",
        "the same, where one layer holds all experts",
        _grouped_forward,
        parameters="permuted_local_hidden_states tokens_per_expert permuted_probs output_buffer grad_input_buffer",
        versions=VERSIONS,
        order_free=True,
    ),
]

"""transformer_engine.pytorch.module.linear: `Linear`, under Megatron's TERow- and TEColumnParallelLinear."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.experts import are_experts, expert_products
from patches.te.context import refuse_uncovered, te_attribute
from patches.te.product import bias_to_return, pieces_of, product

__all__ = ["PATCHES"]


def _forward(original: Any) -> Any:
    def forward(
        self: Any,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:
        weights = [getattr(self, name) for name in self.weight_names]
        refuse_uncovered(self, inp, weights)
        if are_experts(self):
            return expert_products(self, inp, weights)
        weight, bias = self._get_weight_and_bias_tensors()
        pieces = pieces_of(weights) if self.parallel_mode == "column" else 1
        y = product(
            self, self.parallel_mode, inp, weight, bias if self.apply_bias else None, pieces, is_first_microbatch
        )
        return (y, bias_to_return(self, self.parallel_mode, bias, y)) if self.return_bias else y

    return forward


PATCHES = [
    te_attribute(
        "te-linear",
        "transformer_engine.pytorch.module.linear:Linear.forward",
        "row: sum over input features, bias gradient over tokens; column: dgrad over output features",
        _forward,
        parameters="inp is_first_microbatch fp8_output fp8_grad",
    )
]

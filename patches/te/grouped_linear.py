"""transformer_engine.pytorch.module.grouped_linear: `GroupedLinear`, the layers of a rank's experts in one.

It is covered in Megatron's mixtures of experts alone: by itself it does not know which rows are of which sequence.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.contract import UnsupportedError
from patches.experts import are_experts, expert_products
from patches.te.context import refuse_uncovered, te_attribute

__all__ = ["PATCHES"]


def _forward(original: Any) -> Any:
    def forward(
        self: Any,
        inp: Tensor,
        m_splits: list[int] | Tensor,
        is_first_microbatch: bool | None = None,
        out: Tensor | None = None,
        dgrad_out: Tensor | None = None,
    ) -> Tensor:
        for found, setting, way_out in (
            (not are_experts(self), "use outside of Megatron's MoELayer", "make experts of Linear"),
            (self.use_bias, "bias=True", "experts have no biases: set it to False"),
            (getattr(self, "single_grouped_weight", False), "single_grouped_weight=True", "leave it False"),
            (out is not None or dgrad_out is not None, "a preallocated result", "leave out and dgrad_out None"),
        ):
            if found:
                raise UnsupportedError(
                    f"transformer_engine GroupedLinear: {setting} is not covered by the patches: {way_out}"
                )
        weights = [getattr(self, f"weight{number}") for number in range(self.num_gemms)]
        refuse_uncovered(self, inp, weights)
        return expert_products(self, inp, weights)

    return forward


PATCHES = [
    te_attribute(
        "te-grouped-linear",
        "transformer_engine.pytorch.module.grouped_linear:GroupedLinear.forward",
        "sums over an expert's width, which ETP spreads over ranks, and over its tokens, which all layouts do",
        _forward,
        parameters="inp m_splits is_first_microbatch out dgrad_out",
    )
]

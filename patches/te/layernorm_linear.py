"""transformer_engine.pytorch.module.layernorm_linear: `LayerNormLinear`, under Megatron's QKV and fc1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patches.call_site import mark_grad_reduced
from patches.contract import UnsupportedError
from patches.ops.gather import gather_tokens
from patches.ops.norm import TOKENS, norm
from patches.te.context import refuse_uncovered, te_attribute, tokens
from patches.te.product import bias_to_return, pieces_of, product

__all__ = ["PATCHES", "layer_norm", "norm_to_return"]


def layer_norm(module: Any, x: Tensor) -> Tensor:
    """The norm inside LayerNormLinear and LayerNormMLP."""
    weight, beta = module.layer_norm_weight, module.layer_norm_bias
    mark_grad_reduced(weight, beta)
    gamma = weight.float() + 1 if module.zero_centered_gamma else weight
    return norm(x, gamma, beta, module.eps, module.normalization == "LayerNorm", TOKENS, tokens(module), weight)


def norm_to_return(module: Any, normed: Tensor) -> Tensor:
    """What `return_layernorm_output` adds to the results, with a gradient in every case.

    TE's own LayerNormLinear loses the gradient of the gathered output; its LayerNormMLP sums the ranks' parts.
    """
    gathered = module.return_layernorm_output_gathered and module.sequence_parallel and module.tp_size > 1
    return gather_tokens(normed, module.tp_group) if gathered else normed


def _forward(original: Any) -> Any:
    def forward(
        self: Any,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:
        mode = self.parallel_mode
        if mode == "row" and self.tp_size > 1:
            raise UnsupportedError("LayerNormLinear(parallel_mode='row') is not covered: use LayerNorm and Linear")
        weights = [getattr(self, name) for name in self.weight_names]
        refuse_uncovered(self, inp, [*weights, self.layer_norm_weight])
        weight, bias = self._get_weight_and_bias_tensors()
        normed = layer_norm(self, inp)
        pieces = pieces_of(weights) if mode == "column" else 1
        y = product(self, mode, normed, weight, bias if self.apply_bias else None, pieces, is_first_microbatch)
        results = [y]
        if self.return_bias:
            results.append(bias_to_return(self, mode, bias, y))
        if self.return_layernorm_output:
            results.append(norm_to_return(self, normed))
        return tuple(results) if len(results) > 1 else y

    return forward


PATCHES = [
    te_attribute(
        "te-layernorm-linear",
        "transformer_engine.pytorch.module.layernorm_linear:LayerNormLinear.forward",
        "dgrad sums over output features, gamma and beta gradients over tokens, both spread over ranks",
        _forward,
        parameters="inp is_first_microbatch fp8_output fp8_grad",
    )
]

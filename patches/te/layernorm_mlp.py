"""transformer_engine.pytorch.module.layernorm_mlp: `LayerNormMLP`, norm, fc1, activation and fc2 in one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from patches.contract import UnsupportedError
from patches.te.context import refuse_uncovered, te_attribute
from patches.te.layernorm_linear import layer_norm, norm_to_return
from patches.te.product import bias_to_return, product

__all__ = ["PATCHES"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "srelu": lambda x: F.relu(x) * F.relu(x),
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
}
GATED = {"geglu": "gelu", "reglu": "relu", "swiglu": "silu", "sreglu": "srelu", "qgeglu": "qgelu"}


def _forward(original: Any) -> Any:
    def forward(self: Any, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        if not getattr(self, "checkpoint", False):
            return compute(self, inp, is_first_microbatch)
        return checkpoint(compute, self, inp, is_first_microbatch, use_reentrant=False, preserve_rng_state=False)

    def compute(self: Any, inp: Tensor, is_first_microbatch: bool | None) -> Any:
        refuse_uncovered(self, inp, [self.fc1_weight, self.fc2_weight, self.layer_norm_weight])
        if self.tp_size > 1 and not self.set_parallel_mode:
            raise UnsupportedError(
                "LayerNormMLP(set_parallel_mode=False) is not covered with tp_size > 1: set it to True"
            )
        normed = layer_norm(self, inp)
        fc1_bias, fc2_bias = (self.fc1_bias, self.fc2_bias) if self.use_bias else (None, None)
        pieces = 2 if self.activation in GATED else 1
        x = product(self, "column", normed, self.fc1_weight, fc1_bias, pieces, is_first_microbatch)
        x = activate(self.activation, x)
        y = product(self, "row", x, self.fc2_weight, fc2_bias if self.apply_bias else None, 1, is_first_microbatch)
        results = [y]
        if self.return_bias:
            results.append(bias_to_return(self, "row", self.fc2_bias, y))
        if self.return_layernorm_output:
            results.append(norm_to_return(self, normed))
        return tuple(results) if len(results) > 1 else y

    return forward


def activate(name: str, x: Tensor) -> Tensor:
    """The activation in float32, rounded once, as in TE's kernels."""
    function = ACTIVATIONS.get(GATED.get(name, name))
    if function is None:
        raise UnsupportedError(f"activation={name!r} is not covered: use one of {', '.join([*ACTIVATIONS, *GATED])}")
    if name not in GATED:
        return function(x.float()).to(x.dtype)
    gate, up = x.float().chunk(2, -1)
    return (function(gate) * up).to(x.dtype)


PATCHES = [
    te_attribute(
        "te-layernorm-mlp",
        "transformer_engine.pytorch.module.layernorm_mlp:LayerNormMLP.forward",
        "fc1's dgrad and fc2 sum over the feed-forward dimension, norm and bias gradients over tokens",
        _forward,
        parameters="inp is_first_microbatch",
    )
]

"""megatron.core.extensions.transformer_engine: how Megatron's TE layers initialise their weights.

Before megatron-core 0.16 they also don't know that a gated fc1 holds [gate_r | up_r] (`stride=2`).
"""

from __future__ import annotations

import inspect
from typing import Any

from patches.contract import UnsupportedError
from patches.initial_weights import WHY, note
from patches.te.context import te_attribute

__all__ = ["PATCHES"]


def _init(partition_dim: int) -> Any:
    def replacement(original: Any) -> Any:
        knows_stride = "stride" in inspect.signature(original).parameters

        def __init__(self: Any, input_size: int, output_size: int, **kwargs: Any) -> None:
            stride, config = kwargs.get("stride", 1), kwargs["config"]
            if not knows_stride:
                kwargs.pop("stride", None)
            original(self, input_size, output_size, **kwargs)
            if config.init_model_with_meta_device:
                raise UnsupportedError("init_model_with_meta_device=True is not covered: set it to False")
            if stride > 1:
                self.weight.partition_stride = stride
            if config.perform_initialization:
                note(self.weight, kwargs["init_method"], partition_dim, stride)

        return __init__

    return replacement


def _init_patch(name: str, cls: str, partition_dim: int) -> Any:
    return te_attribute(
        name,
        f"megatron.core.extensions.transformer_engine:{cls}.__init__",
        WHY,
        _init(partition_dim),
    )


PATCHES = [
    _init_patch("te-init-row", "TERowParallelLinear", 1),
    _init_patch("te-init-column", "TEColumnParallelLinear", 0),
    _init_patch("te-init-layernorm-column", "TELayerNormColumnParallelLinear", 0),
]

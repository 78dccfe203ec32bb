"""megatron.core.extensions.transformer_engine: how Megatron's TE layers initialise their weights.

Before megatron-core 0.16 they also don't know that a gated fc1 holds [gate_r | up_r] (`stride=2`); those that hold all
experts never do, nor do those of experts know along which dimension they are cut, or with some versions of TE
that they are.
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
            stride = kwargs.get("stride", 1)
            if not knows_stride:
                kwargs.pop("stride", None)
            original(self, input_size, output_size, **kwargs)
            _note(self, [self.weight], partition_dim, stride, kwargs)

        return __init__

    return replacement


def _grouped_init(partition_dim: int) -> Any:
    def replacement(original: Any) -> Any:
        def __init__(self: Any, num_gemms: int, input_size: int, output_size: int, **kwargs: Any) -> None:
            original(self, num_gemms, input_size, output_size, **{**kwargs, "init_method": lambda weight: None})
            stride = 2 if partition_dim == 0 and kwargs["config"].gated_linear_unit else 1
            weights = [getattr(self, f"weight{number}") for number in range(num_gemms)]
            _note(self, weights, partition_dim, stride, kwargs)

        return __init__

    return replacement


def _note(layer: Any, weights: list[Any], partition_dim: int, stride: int, kwargs: dict[str, Any]) -> None:
    """Have the weights of a layer that was built with `kwargs` drawn by name, cut as they are."""
    config, is_expert = kwargs["config"], kwargs.get("is_expert")
    if config.init_model_with_meta_device:
        raise UnsupportedError("init_model_with_meta_device=True is not covered: set it to False")
    rank, size = (layer._tp_group.rank(), layer._tp_group.size()) if is_expert else (None, None)
    for weight in weights:
        if stride > 1 or is_expert:
            weight.partition_stride = stride
        if is_expert:
            weight.tensor_model_parallel, weight.partition_dim = True, partition_dim
        if config.perform_initialization:
            note(weight, kwargs["init_method"], partition_dim, stride, rank, size)


def _init_patch(name: str, cls: str, init: Any) -> Any:
    return te_attribute(name, f"megatron.core.extensions.transformer_engine:{cls}.__init__", WHY, init)


PATCHES = [
    _init_patch("te-init-row", "TERowParallelLinear", _init(1)),
    _init_patch("te-init-column", "TEColumnParallelLinear", _init(0)),
    _init_patch("te-init-layernorm-column", "TELayerNormColumnParallelLinear", _init(0)),
    _init_patch("te-init-grouped-row", "TERowParallelGroupedLinear", _grouped_init(1)),
    _init_patch("te-init-grouped-column", "TEColumnParallelGroupedLinear", _grouped_init(0)),
]

"""megatron.core.transformer.mlp before 0.16: fc1 of a gated MLP does not say that it holds [gate_r | up_r]."""

from __future__ import annotations

from typing import Any

from patches.registry import attribute

__all__ = ["PATCHES"]


def _build_module(original: Any) -> Any:
    def build_module(spec: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("tp_comm_buffer_name") == "fc1" and kwargs["config"].gated_linear_unit:
            kwargs["stride"] = 2
        return original(spec, *args, **kwargs)

    return build_module


PATCHES = [
    attribute(
        "gated-fc1",
        "megatron.core.transformer.mlp:build_module",
        "without stride=2 the initial gate/up pairing depends on TP",
        _build_module,
        parameters="spec_or_module args kwargs",
        versions="<0.16",
    )
]

"""Settings that the promise does not cover, refused when a module that has them is built."""

from __future__ import annotations

from typing import Any

from patches.contract import UnsupportedError
from patches.megatron.context import contract
from patches.registry import attribute

__all__ = ["PATCHES", "check_config"]

# setting: (what is covered, the way out)
COVERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_dropout": ((0, 0.0), "set it to 0"),
    "attention_dropout": ((0, 0.0), "set it to 0"),
    "fp8": ((None, False), "train in bf16 or fp32"),
    "fp4": ((None, False), "train in bf16 or fp32"),
    "fp16": ((None, False), "train in bf16 or fp32"),
    "num_moe_experts": ((None,), "train a dense model"),
    "multi_latent_attention": ((None, False), "use multi-head or grouped-query attention"),
    "context_parallel_size": ((None, 1), "set it to 1"),
    "pipeline_model_parallel_size": ((None, 1), "set it to 1"),
    "tp_comm_overlap": ((None, False), "set it to False"),
    "cpu_offloading": ((None, False), "set it to False"),
    "gtp_weight_remat_size": ((None, 1), "set it to 1"),
    "delay_wgrad_compute": ((None, False), "set it to False"),
    "use_te_activation_func": ((None, False), "set it to False"),
}

UNCOVERED_MODULES = ("transformer_engine", "apex", "megatron.core.extensions")


def check_config(config: Any) -> None:
    """Raise `UnsupportedError` for the first setting of a Megatron config that is not covered."""
    contract().check_tp(getattr(config, "tensor_model_parallel_size", 1))
    for setting, (covered, way_out) in COVERED.items():
        value = getattr(config, setting, None)
        if value not in covered:
            raise UnsupportedError(f"{setting}={value!r} is not covered by the patches: {way_out}")


def _module_init(original: Any) -> Any:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        check_config(config)
        original(self, config, *args, **kwargs)

    return __init__


def _layer_init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name, module in self.named_modules():
            if type(module).__module__.startswith(UNCOVERED_MODULES):
                raise UnsupportedError(
                    f"{name} is a {type(module).__module__}.{type(module).__name__}, which is not covered: "
                    "build the model from get_gpt_layer_local_spec()"
                )

    return __init__


PATCHES = [
    attribute(
        "settings",
        "megatron.core.transformer.module:MegatronModule.__init__",
        "refuses settings that are not covered",
        _module_init,
        parameters="config",
    ),
    attribute(
        "layer-modules",
        "megatron.core.transformer.transformer_layer:TransformerLayer.__init__",
        "refuses layers made of modules that are not covered",
        _layer_init,
    ),
]

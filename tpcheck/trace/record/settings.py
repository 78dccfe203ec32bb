"""What a step is made with that is exact by nature: groups of parameters, rates, counts, configurations, generators.

    settings.jsonl   {"step": 0, "run": {"clip_grad": 1.0, …}, "groups": [{"lr": 1e-3, …}, …],
                      "parameters": {"decoder.final_layernorm.weight": {"group": 0, "requires_grad": true, …}, …},
                      "modules": {"decoder.final_layernorm": {"eps": 1e-6}, …}, "generators": {"torch": "9f3c…"}}

A line a step and rank. Whatever of it two runs of one function may differ in, as in how they are cut or which kernels
they use, is left out.
"""

from __future__ import annotations

import functools
import hashlib
import json
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["Settings", "generators", "modules", "run_settings"]

# Of a parameter group: how it is computed, and where, and not what.
EXECUTION = {
    "params",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "default_config",
    "step",
    "name",
    "is_expert_parallel",
}
# Of Megatron's TransformerConfig: what function is computed. What is not named here may follow the layout.
CONFIG = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "hidden_dropout", "attention_dropout", "layernorm_epsilon", "layernorm_zero_centered_gamma", "normalization",
    "add_bias_linear", "add_qkv_bias", "gated_linear_unit", "activation_func", "activation_func_clamp_value",
    "glu_linear_offset", "qk_layernorm", "qk_l2_norm", "window_size", "softmax_scale", "softmax_type",
    "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "fp32_residual_connection",
    "apply_residual_connection_post_layernorm", "rotary_interleaved", "calculate_per_token_loss", "init_method_std",
    "embedding_init_method_std", "fp16", "bf16", "fp8", "fp4", "num_moe_experts", "moe_router_topk",
    "moe_router_score_function", "moe_router_load_balancing_type", "moe_router_dtype", "moe_aux_loss_coeff",
    "moe_z_loss_coeff", "moe_router_topk_scaling_factor", "moe_router_enable_expert_bias",
    "moe_router_bias_update_rate", "moe_expert_capacity_factor", "moe_ffn_hidden_size", "moe_layer_freq",
    "mtp_num_layers", "mtp_loss_scaling_factor", "multi_latent_attention", "q_lora_rank", "kv_lora_rank",
    "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type", "rotary_base", "rotary_percent",
    "rotary_scaling_factor", "mscale", "mscale_all_dim",
)  # fmt: skip
FUNCTIONS = ("activation_func", "act_fn", "activation", "activation_fn")
SKIPPED = {"training"}


class Settings:
    """Gathers a step's settings; `line` is its line of `settings.jsonl`."""

    def __init__(self) -> None:
        self.step: dict[str, Any] = {}
        self.groups: list[dict[str, Any]] = []

    def begin(self, values: Mapping[str, Any]) -> None:
        """A new step, which begins with `values` of "run", "modules", "generators"."""
        self.step, self.groups = {"run": {}, "parameters": {}, **values}, []

    def note(self, name: str, value: Any) -> None:
        """A number of the run, such as a loss scale."""
        if self.step:
            self.step["run"][name] = plain(value)

    def group(self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> int:
        """The number of what `group` is set to, among the different ones of this step."""
        found = {
            key: plain(value)
            for key, value in group.items()
            if key not in EXECUTION and not key.startswith(("pre_", "initial_", "max_lr", "min_lr")) and is_plain(value)
        }
        found["optimizer"] = type(optimizer).__name__
        if found not in self.groups:
            self.groups.append(found)
        return self.groups.index(found)

    def parameter(self, name: str, **values: Any) -> None:
        """What is known of a parameter; later calls add to it."""
        if self.step:
            self.step["parameters"].setdefault(name, {}).update(values)

    def line(self, step: int) -> str:
        return json.dumps({"step": step, **self.step, "groups": self.groups})


def run_settings(config: Any, models: list[torch.nn.Module]) -> dict[str, Any]:
    """The fields of Megatron's configuration, of the model and of its DDP, that say what is computed."""
    found = {}
    if config is not None:
        named = ((name, getattr(config, name)) for name in CONFIG if hasattr(config, name))
        found = {f"config.{name}": described(value) for name, value in named}
    ddp = next((one for model in models if (one := getattr(model, "ddp_config", None)) is not None), None)
    if hasattr(ddp, "grad_reduce_in_fp32"):
        found["config.grad_reduce_in_fp32"] = bool(ddp.grad_reduce_in_fp32)  # type: ignore[union-attr]
    return {name: value for name, value in found.items() if is_plain(value)}


def modules(labelled: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each module its numbers with a point, such as an epsilon, and its activation function."""
    for label, module in labelled.items():
        found = {
            name: described(value)
            for name, value in vars(module).items()
            if not name.startswith("_")
            and name not in SKIPPED
            and (isinstance(value, float) or (name in FUNCTIONS and callable(value)))
        }
        functions = ((name, child) for name, child in module.named_children() if name in FUNCTIONS)
        found |= {name: type(child).__name__ for name, child in functions}
        if found:
            yield label, found


def generators() -> dict[str, str]:
    """A digest of the state of every generator that training may draw from."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    random = sys.modules.get("megatron.core.tensor_parallel.random")
    tracker = random.get_cuda_rng_tracker() if random is not None else None
    states |= {str(name): state for name, state in (tracker.get_states() if tracker is not None else {}).items()}
    return {name: _digest(state) for name, state in states.items() if isinstance(state, torch.Tensor)}


def _digest(state: torch.Tensor) -> str:
    return hashlib.blake2b(state.cpu().contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


def described(value: Any) -> Any:
    """A function by its name and the arguments that it is given; anything else as it is."""
    if isinstance(value, functools.partial):
        given = ", ".join([*map(repr, value.args), *(f"{key}={given!r}" for key, given in value.keywords.items())])
        return f"{described(value.func)}({given})"
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    return getattr(value, "__name__", type(value).__name__) if isinstance(value, Callable) else value  # type: ignore[arg-type]


def plain(value: Any) -> Any:
    """A number or text, out of a tensor if need be."""
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, (tuple, list)):
        return [plain(one) for one in value]
    if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
        return float(value)
    return value


def is_plain(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, numbers.Real, str))

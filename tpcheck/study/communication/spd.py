"""Sync-point drop: in chosen blocks the all-reduce of attention's output is left out (after arXiv 2502.20727).

    usual     x ── attention_r ─[sum]─ + x ── MLP_r ─[sum]─ + ──        two sums over ranks a block, forward
    dropped   x ── attention_r ── + x ── MLP_r ── + attention_r ─[sum]─ + x      one: the MLP of a rank sees the output
                                                                               of that rank's own heads alone

This is our reading of its abstract, for evaluation alone: attention's parts are carried past the MLP, so that what
leaves the block is the same on all ranks. It is a wrapper of this study: it changes the function, and with TP.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from patches.registry import REGISTRY
from tpcheck.config.schema import RunConfig
from tpcheck.run.data import global_batch, open_data
from tpcheck.run.model import build_model, build_optimizer, set_learning_rate, train_step, transformer_config
from tpcheck.study.communication.settings import SIZES, Communication
from tpcheck.study.megatron import begin, own_share
from tpcheck.study.ranks import on_ranks
from tpcheck.study.study import Progress

__all__ = ["spd"]

EVALUATED = 4  # batches that were not trained on


def spd(settings: Communication, progress: Progress) -> dict[str, Any]:
    """A trained model's loss by blocks dropped: each alone, then ever more of them at every TP size."""
    progress(0.0, f"training, {settings.steps} steps")
    curve, weights = on_ranks(1, _train, settings.trained())[0]
    blocks = range(settings.trained_layers)
    progress(0.6, "each block alone, TP=4")
    alone = on_ranks(4, _evaluate, settings.trained(4, dtype="fp32"), weights, [[block] for block in blocks])[0]
    order = sorted(blocks, key=lambda block: alone[block])
    chosen = [order[:count] for count in range(len(order) + 1)]
    losses = {}
    for number, tp in enumerate(SIZES):
        progress(0.7 + 0.3 * number / len(SIZES), f"TP={tp}")
        losses[str(tp)] = on_ranks(tp, _evaluate, settings.trained(tp, dtype="fp32"), weights, chosen)[0]
    return {"curve": curve, "alone": alone, "order": order, "losses": losses}


def _train(config: RunConfig) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of all steps, and the weights."""
    begin("stock")
    (model,), pieces = build_model(config, transformer_config(config))
    optimizer, data, curve = build_optimizer(config, pieces), open_data(config), []
    for step in range(config.steps):
        set_learning_rate(config, optimizer, step)
        loss, _ = train_step(config, pieces, optimizer, [global_batch(data, config, step)])
        curve.append(loss)
    return curve, {name: parameter.detach().float() for name, parameter in model.named_parameters()}


def _evaluate(config: RunConfig, weights: dict[str, Tensor], choices: list[list[int]]) -> list[float]:
    """The loss with each choice of blocks dropped, on the same unseen batches, in float32."""
    begin("stock")
    (model,), _ = build_model(config, transformer_config(config))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(own_share(parameter, weights[name]))
    data = open_data(config)
    batches = [global_batch(data, config, config.steps + number) for number in range(EVALUATED)]
    found = []
    for choice in choices:
        for block, layer in enumerate(model.decoder.layers):
            _drop(layer, block in choice)
        found.append(math.fsum(_loss(model, batch) for batch in batches) / EVALUATED)
    return found


def _loss(model: torch.nn.Module, tokens: Tensor) -> float:
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    with torch.no_grad():
        return float(model(inputs, positions, None, labels=labels).double().mean())


def _drop(layer: Any, dropped: bool) -> None:
    """Leave attention's sum out of this block, or put it back."""
    assert REGISTRY.contract is None, "under the patches a row-parallel layer always adds"
    for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
        linear.explicit_expert_comm = dropped  # Megatron's own switch for a partial sum that somebody else adds
    if dropped:
        layer.forward = types.MethodType(_forward, layer)
    else:
        vars(layer).pop("forward", None)


def _forward(layer: Any, hidden_states: Tensor, attention_mask: Any = None, **others: Any) -> tuple[Tensor, None]:
    attended, bias = layer.self_attention(layer.input_layernorm(hidden_states), attention_mask=attention_mask)
    seen = hidden_states + attended + bias
    transformed, mlp_bias = layer.mlp(layer.pre_mlp_layernorm(seen))
    summed = reduce_from_tensor_model_parallel_region(attended + transformed)
    return hidden_states + bias + mlp_bias + summed, None

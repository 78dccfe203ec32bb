"""How many parameters the model has, and what loss it starts with, which follows from what it has to predict.

A logit of h, the last norm's output, is h·e: of a random token's embedding e it is normal with variance |h|²·σ², so the
loss is ln V + |h|²σ²/2. Where the target is the input and embeddings are tied, h still has the target's own embedding
in it, its logit is higher by h·e_target, and the loss lower by as much.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcheck.config.schema import RunConfig
from tpcheck.run.model import build_model, transformer_config
from tpcheck.study.communication.settings import Communication
from tpcheck.study.megatron import begin, random_tokens
from tpcheck.study.ranks import on_ranks
from tpcheck.study.study import Progress

__all__ = ["initial_loss"]


def initial_loss(settings: Communication, progress: Progress) -> dict[str, Any]:
    """Parameters by what they are, and initial losses by seed, tied and untied."""
    rows = []
    for number in range(settings.seeds):
        for tied in (True, False):
            progress((number + (not tied) / 2) / settings.seeds, f"seed {number}")
            config = settings.run(dtype="fp32", seed=number, model={"tied": tied})
            rows.append({"seed": number, "tied": tied, **on_ranks(1, _losses, config)[0]})
    std = settings.run().model.init_std
    counted = {key: rows[0][key] for key in ("parameters", "positions")}
    return {**counted, "ln_v": math.log(settings.vocabulary), "spread": settings.hidden * std**2 / 2, "losses": rows}


def _losses(config: RunConfig) -> dict[str, float]:
    begin("stock")
    (model,), _ = build_model(config, transformer_config(config))
    normed: list[Tensor] = []
    model.decoder.final_layernorm.register_forward_hook(lambda module, args, out: normed.append(out.detach()))
    tokens = random_tokens(config, config.seed)
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(config.seq_length).expand_as(inputs)
    with torch.no_grad():
        logits = model(inputs, positions, None).squeeze(0)
        own = model.embedding.word_embeddings.weight[inputs[0]]
        lift = (normed[0].squeeze(1) * own).sum(-1).mean()
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "positions": model.embedding.position_embeddings.weight.numel(),
            "same": F.cross_entropy(logits, inputs[0]).item(),
            "next": F.cross_entropy(logits, following[0]).item(),
            "lift": lift.item(),
        }

"""Runs of a recipe on gloo ranks: one traced step, or a training."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tpcheck
from tpcheck.study.frameworks.hugging_face import IMPLEMENTATIONS
from tpcheck.study.frameworks.megatron import megatron
from tpcheck.study.frameworks.recipe import Ready, Recipe, tokens
from tpcheck.study.ranks import on_ranks

__all__ = ["import_once", "traced_step", "training"]

TRACED = ["start", "out", "dout", "grad"]


def import_once() -> None:
    """In the process that ranks are forked from."""
    os.environ.update(DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    import deepspeed  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    torch.set_num_threads(1)


def traced_step(recipe: Recipe, folder: Path) -> list[float]:
    """One step, its trace in `folder`; the loss of every data-parallel rank."""
    losses = on_ranks(recipe.world, _traced_step, recipe, str(folder))
    return losses[:: recipe.tp]


def _traced_step(recipe: Recipe, folder: str) -> float:
    ready = _ready(recipe)
    ids = tokens(recipe, 0, dist.get_rank() // recipe.tp)
    with tpcheck.trace(folder, ready.traced, kinds=TRACED):
        loss, _ = ready.step(ids)
    return loss


def training(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Losses, means over data-parallel ranks, gradient norms, and how many of rank 0's weights the first step moved."""
    found = on_ranks(recipe.world, _training, recipe, steps)
    by_rank = [one["losses"] for one in found[:: recipe.tp]]
    return {**found[0], "losses": [sum(step) / len(step) for step in zip(*by_rank, strict=True)]}


def _training(recipe: Recipe, steps: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    ready = _ready(recipe)
    model = ready.traced[0] if isinstance(ready.traced, list) else ready.traced
    before = [_local(p).detach().clone() for p in model.parameters()]
    losses, norms, moved = [], [], 0.0
    for step in range(steps):
        ids = tokens(recipe, step, dist.get_rank() // recipe.tp)
        loss, norm = ready.step(ids)
        losses.append(loss)
        norms.append(norm)
        if not step:
            after = [_local(p) for p in model.parameters()]
            changed = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
            moved = changed / sum(p.numel() for p in after)
    return {"losses": losses, "norms": norms, "moved": moved}


def _ready(recipe: Recipe) -> Ready:
    return megatron(recipe) if recipe.framework == "megatron" else IMPLEMENTATIONS[recipe.framework](recipe)


def _local(parameter: Any) -> torch.Tensor:
    local: torch.Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local

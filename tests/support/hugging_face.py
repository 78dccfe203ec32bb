"""Tiny Hugging Face models, built from a configuration, and ordinary loops around them. Nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tpcheck
from tests.support.traces import recorded

SIDES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 32}  # fmt: skip


def language_model(name: str = "Qwen3", **settings: Any) -> nn.Module:
    """A causal language model with the same weights whenever asked for; no bias is zero."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{name}Config")(**{**SIDES, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def tokens(rank: int = 0, size: int = 1) -> torch.Tensor:
    """This data-parallel rank's of four samples."""
    return torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1)).chunk(size)[rank]


def train(path: Path, model: nn.Module, x: torch.Tensor, perturb: int = 0) -> None:
    """Two steps as everybody writes them."""
    recorded(path, model, lambda: model(input_ids=x, labels=x).loss, lr=1e-2, perturb=perturb)


def reference(path: Path, name: str = "Qwen3", **settings: Any) -> Path:
    """One process without torch.distributed, and its nudged runs."""
    train(path, language_model(name, **settings), tokens())
    for seed in (1, 2, 3):
        train(path / f"noise-{seed}", language_model(name, **settings), tokens(), perturb=seed)
    return path


def deepspeed_run(
    path: str, config: dict[str, Any], name: str = "Qwen3", wrong: bool = False, inner: bool = False,
    x: torch.Tensor | None = None, **sides: Any,
) -> None:  # fmt: skip
    """Two steps of DeepSpeed's own loop, on gloo ranks; `wrong` halves a parameter's gradient on rank 0.

    Args:
        inner: trace the model inside the engine, which is refused.
        x: this rank's samples, of four all together if none are given.
        sides: of another model than the tiny one.
    """
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), RANK=str(dist.get_rank()), DS_ACCELERATOR="cpu",
                      WORLD_SIZE=str(dist.get_world_size()), LOCAL_SIZE=str(dist.get_world_size()),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # fmt: skip
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled; gloo does it as well
    tp = config.get("tensor_parallel", {}).get("autotp_size", 1)
    model = language_model(name, **sides)
    if wrong and dist.get_rank() == 0:
        model.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient / 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = {
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 4 * tp // dist.get_world_size() if x is None else len(x),
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
    }
    if tp == 1:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**settings, **config})
    else:  # AutoTP replaces parameters before it makes its own optimizer
        own = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 1e-2, "torch_adam": True}}
        engine, *_ = deepspeed.initialize(model=model, config={**settings, "optimizer": own, **config})
    x = tokens(dist.get_rank() // tp, dist.get_world_size() // tp) if x is None else x
    with tpcheck.trace(path, engine.module if inner else engine):
        for _ in range(2):
            loss = engine(input_ids=x, labels=x).loss
            engine.backward(loss)
            engine.step()

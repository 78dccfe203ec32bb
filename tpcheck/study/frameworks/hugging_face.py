"""Qwen2 of Hugging Face in torch's DDP, DeepSpeed's AutoTP and FSDP2 with DTensor's tensor parallelism."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpcheck.study.frameworks.recipe import Ready, Recipe

__all__ = ["IMPLEMENTATIONS", "language_model"]

SEED = 42


def language_model(recipe: Recipe) -> Any:
    """The model with the same weights in every process, float32 or bfloat16; RoPE's frequencies stay float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        num_hidden_layers=2, tie_word_embeddings=True, max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, attn_implementation="sdpa", **recipe.sizes,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(config)
    if recipe.biases:
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    frequencies = model.model.rotary_emb
    model.bfloat16()  # all start from bfloat16 weights
    model.model.rotary_emb = type(frequencies)(config=config)
    return model.float() if recipe.precision == "fp32" else model


def _loss(net: Any, ids: Tensor) -> Tensor:
    loss: Tensor = net(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
    return loss


def _ready(net: Any, model: nn.Module, recipe: Recipe, context: Any = contextlib.nullcontext) -> Ready:
    """An ordinary loop of torch's around `net`."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0, foreach=False)

    def step(ids: Tensor) -> tuple[float, float]:
        optimizer.zero_grad()
        with context():
            loss = _loss(net, ids)
        loss.backward()
        norm = _clip(parameters, recipe) if recipe.clip else 0.0
        optimizer.step()
        return loss.item(), norm

    return Ready(net, step)


def _clip(parameters: list[nn.Parameter], recipe: Recipe) -> float:
    """Scale gradients to the norm `recipe.clip`; their norm before. torch's own fails on two meshes, and adds up in
    float32 or bfloat16."""
    total = 0.0
    gradients: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        own = gradient.to_local() if recipe.wrong_clip and hasattr(gradient, "to_local") else gradient
        squares = own.double().pow(2).sum()
        total += float(squares.full_tensor() if hasattr(squares, "full_tensor") else squares)
    if recipe.wrong_clip:
        everywhere = torch.tensor(total, dtype=torch.float64)
        dist.all_reduce(everywhere)
        total = float(everywhere)
    norm = math.sqrt(total)
    for gradient in gradients:
        getattr(gradient, "_local_tensor", gradient).mul_(min(1.0, recipe.clip / (norm + 1e-6)))
    return norm


def _ddp(recipe: Recipe) -> Ready:
    model = language_model(recipe)
    master = recipe.precision == "master"
    if master:
        model.float()
    net = nn.parallel.DistributedDataParallel(model)
    return _ready(net, model, recipe, lambda: torch.autocast("cpu", torch.bfloat16, enabled=master))


def _fsdp(recipe: Recipe) -> Ready:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    # A norm is summed over both dimensions of the mesh, one after the other, and DTensor says so every time.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    model = language_model(recipe)
    mesh = init_device_mesh("cpu", (recipe.dp, recipe.tp), mesh_dim_names=("dp", "tp"))
    columns = [*(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
    plan = {**{name: ColwiseParallel() for name in columns}, "self_attn.o_proj": RowwiseParallel(),
            "mlp.down_proj": RowwiseParallel()}  # fmt: skip
    policy = MixedPrecisionPolicy()
    if recipe.precision == "master":
        model.float()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], plan)
    if not recipe.no_sync:
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh["dp"], mp_policy=policy)
    return _ready(model, model, recipe)


def _autotp(recipe: Recipe) -> Ready:
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(recipe.world),
                      LOCAL_SIZE=str(recipe.world), MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
                      DS_ACCELERATOR="cpu")  # fmt: skip
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled; gloo does it as well
    deepspeed.utils.logger.setLevel("ERROR")
    low = {"enabled": recipe.precision != "fp32"}
    if recipe.precision == "bf16":
        low |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    adam = {"lr": recipe.lr, "weight_decay": 0.0, "torch_adam": True, "adam_w_mode": True}
    engine, *_ = deepspeed.initialize(model=language_model(recipe), config={
        "train_micro_batch_size_per_gpu": recipe.batch,
        "gradient_clipping": recipe.clip,  # its default is 1
        "zero_optimization": {"stage": 0 if recipe.precision == "fp32" else 1, "overlap_comm": False},
        "bf16": low,
        "tensor_parallel": {"autotp_size": recipe.tp, "preset_model": "qwen2"},
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    })  # fmt: skip
    down = engine.module.model.layers[0].mlp.down_proj.weight
    if down.shape[1] * recipe.tp != recipe.sizes["intermediate_size"]:  # some versions shard nothing, silently
        raise RuntimeError(f"AutoTP left down_proj {tuple(down.shape)} on each of {recipe.tp} ranks")

    def step(ids: Tensor) -> tuple[float, float]:
        loss = _loss(engine, ids)
        engine.backward(loss)
        engine.step()
        return loss.item(), float(engine.get_global_grad_norm() or 0.0)

    return Ready(engine, step)


IMPLEMENTATIONS = {"ddp": _ddp, "autotp": _autotp, "fsdp": _fsdp}

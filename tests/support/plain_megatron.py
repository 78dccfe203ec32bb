"""A small Megatron training script that knows nothing of this project: megatron-core's GPTModel, DDP and optimizer.

Prints one JSON object: a digest of every gradient, float32 main parameter, loss and gradient norm. Options are
TransformerConfig fields (KEY=VALUE) besides those below.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

QWEN3 = {
    "num_layers": 1, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 8, "kv_channels": 8,
    "ffn_hidden_size": 72, "normalization": "RMSNorm", "qk_layernorm": True, "gated_linear_unit": True,
    "activation_func": F.silu, "add_bias_linear": False,
}  # fmt: skip
GPT2 = {
    "num_layers": 1, "hidden_size": 64, "num_attention_heads": 8, "kv_channels": 8, "ffn_hidden_size": 136,
    "normalization": "LayerNorm", "activation_func": F.gelu, "add_bias_linear": True,
}  # fmt: skip
SHARED = {
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False, "masked_softmax_fusion": False, "persist_layer_norm": False,
    "apply_rope_fusion": False, "bias_activation_fusion": False, "bias_dropout_fusion": False,
}  # fmt: skip


def train(
    tp: int = 1,
    sp: bool = False,
    pp: int = 1,
    vpp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    dtype: str = "bf16",
    shape: str = "qwen3",
    vocab: int = 200,
    seq: int = 24,
    micro_batch: int = 2,
    microbatches: int = 2,
    global_batch: int | None = None,
    steps: int = 2,
    clip: float = 0.05,
    loss_scale: float | None = None,
    tied: bool = False,
    negative_zeros: bool = False,
    equal_scores: bool = False,
    te: bool = False,
    digested: bool = True,
    ddp: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train in an initialised process group; the result is the same on every rank.

    With `global_batch` sequences, in micro-batches of `micro_batch`, the loss is a masked sum over tokens and gradients
    are divided by their number; else it is each micro-batch's mean. Gradients are whole tensors unless `digested`.
    """
    virtual_stages = vpp if vpp > 1 else None
    parallel_state.initialize_model_parallel(
        tp, pp, virtual_stages, context_parallel_size=cp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
    )
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1234)
    ddp_options = ddp or {}
    ddp_settings = {"grad_reduce_in_fp32": True, "check_for_nan_in_grad": True, **ddp_options}
    bf16 = dtype == "bf16"
    params_dtype = torch.bfloat16 if bf16 else torch.float32
    shared = {**SHARED, "attention_backend": AttnBackend.unfused} if te else SHARED
    config = TransformerConfig(
        **{**shared, **(GPT2 if shape == "gpt2" else QWEN3), **(model or {})},
        tensor_model_parallel_size=tp, sequence_parallel=sp and tp > 1, bf16=bf16, params_dtype=params_dtype,
        context_parallel_size=cp, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=virtual_stages,
        overlap_p2p_comm=vpp > 1, batch_p2p_comm=vpp == 1,  # as Megatron-LM's arguments set them
        pipeline_dtype=params_dtype, finalize_model_grads_func=finalize_model_grads,
        calculate_per_token_loss=global_batch is not None,
        expert_model_parallel_size=ep, expert_tensor_parallel_size=etp or tp,
    )  # fmt: skip
    if global_batch:
        microbatches = global_batch // (micro_batch * parallel_state.get_data_parallel_world_size())
    if te:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
    stage, last = parallel_state.get_pipeline_model_parallel_rank(), pp * vpp - 1
    gpts = [
        GPTModel(
            config,
            spec,
            vocab_size=vocab,
            max_sequence_length=seq,
            position_embedding_type="learned_absolute" if shape == "gpt2" else "rope",
            share_embeddings_and_output_weights=tied,
            pre_process=virtual * pp + stage == 0,
            post_process=virtual * pp + stage == last,
            vp_stage=virtual if virtual_stages else None,
        )
        for virtual in range(vpp)
    ]
    distributed_optimizer = ddp_options.get("use_distributed_optimizer", False)
    chunks = []
    for gpt in gpts:
        gpt.to(device())
        if negative_zeros:
            gpt.embedding.word_embeddings.weight.data[:, ::2] = -0.0
        if equal_scores:  # of all experts, in the first step
            for layer in gpt.decoder.layers:
                layer.mlp.router.weight.data.zero_()
        chunk = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(**ddp_settings),
            Float16Module(config, gpt) if bf16 else gpt,
            disable_bucketing=bool(chunks),
        )
        chunk.broadcast_params()
        chunks.append(chunk)
    if ddp_options.get("overlap_grad_reduce"):
        config.no_sync_func = chunks[0].no_sync if vpp == 1 else [chunk.no_sync for chunk in chunks]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-2, weight_decay=0.1, bf16=bf16, params_dtype=params_dtype, clip_grad=clip,
            use_distributed_optimizer=distributed_optimizer,
            overlap_param_gather=ddp_options.get("overlap_param_gather", False), log_num_zeros_in_grad=True,
            loss_scale=loss_scale,
        ),
        chunks,
    )  # fmt: skip
    if loss_scale:
        config.grad_scale_func = optimizer.scale_loss
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    parameters = named_parameters(gpts)
    record: dict[str, Any] = {"initial": {n: digest({n: whole(p, p.data)}) for n, p in parameters.items()}}
    for step in range(steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        if global_batch:
            iterators = [samples(step, vocab, seq, micro_batch, global_batch) for _ in chunks]
        else:
            iterators = [batches(step, vocab, seq, micro_batch, microbatches) for _ in chunks]
        losses = get_forward_backward_func()(
            forward_step_func=forward_masked if global_batch else forward_step,
            data_iterator=iterators if virtual_stages else iterators[0],
            model=chunks, num_microbatches=microbatches, seq_length=seq, micro_batch_size=micro_batch,
            forward_only=False,
        )  # fmt: skip
        if global_batch:
            losses = of_all_data_ranks(losses, micro_batch)
        record[f"step{step} loss"] = [float(loss).hex() for loss in losses]
        if not distributed_optimizer:
            grads = {n: whole(p, p.main_grad) for n, p in parameters.items()}
            record[f"step{step} gradients"] = {n: digest({n: g}) if digested else g for n, g in grads.items()}
        _, norm, zeros = optimizer.step()
        record[f"step{step} gradient norm"] = float(norm).hex()
        record[f"step{step} zeros in the gradient"] = zeros
    if ddp_options.get("overlap_param_gather"):
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)
    named = {n: whole(p, getattr(p, "main_param", None) if not distributed_optimizer else p.data, p.data)
             for n, p in parameters.items()}  # fmt: skip
    record["final"] = {n: digest({n: p}) for n, p in named.items()}
    record["final weights"] = {n: digest({n: whole(p, p.data)}) for n, p in parameters.items()}
    for group in (parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_expert_model_parallel_group()):
        record = of_the_whole_model(record, group)
    return record


def named_parameters(gpts: list[GPTModel]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters under their names in the whole model: a rank counts its layers and experts from 0."""
    experts = parallel_state.get_expert_model_parallel_rank()
    found = {}
    for gpt in gpts:
        for name, parameter in gpt.named_parameters():
            if ".local_experts." in name:
                before, _, after = name.partition(".local_experts.")
                number, _, rest = after.partition(".")
                first = experts * len(gpt.get_submodule(before).local_experts)
                name = f"{before}.local_experts.{first + int(number)}.{rest}"
                parameter.of_an_expert = True
            elif grouped := re.fullmatch(r"(.*\.experts)\.(linear_fc\d\.weight)(\d+)", name):
                before, rest, number = grouped.groups()
                first = experts * gpt.get_submodule(before).num_local_experts
                name = f"{before}.local_experts.{first + int(number)}.{rest}"
                parameter.of_an_expert = True
            if name.startswith("decoder.layers."):
                number, _, rest = name.removeprefix("decoder.layers.").partition(".")
                name = f"decoder.layers.{gpt.decoder.layers[int(number)].layer_number - 1}.{rest}"
            if name == "output_layer.weight" and gpt.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"  # the last stage's copy
            found[name] = parameter
    return found


def of_the_whole_model(record: dict[str, Any], group: dist.ProcessGroup) -> dict[str, Any]:
    """The record of all ranks of a group: each has other tensors, or equal copies, its last one the losses."""
    records: list[Any] = [None] * group.size()
    dist.all_gather_object(records, record, group=group)
    whole_model = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found: dict[str, Any] = {}
            for name, digest_ in (item for one in records for item in one[key].items()):
                first = found.setdefault(name, digest_)
                assert first is digest_ or first == digest_, f"{key} of {name} differs between ranks"
            whole_model[key] = found
        elif "loss" in key:
            whole_model[key] = records[-1][key]
        else:
            assert all(one[key] == value for one in records), f"{key} differs between ranks"
            whole_model[key] = value
    return whole_model


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def batches(step: int, vocab: int, seq: int, micro_batch: int, microbatches: int) -> Any:
    generator = torch.Generator().manual_seed(step)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    tokens = torch.randint(0, vocab, (size, microbatches, micro_batch, seq + 1), generator=generator)
    return iter(tokens[rank])


def samples(step: int, vocab: int, seq: int, micro_batch: int, global_batch: int) -> Iterator[torch.Tensor]:
    """This rank's micro-batches of a global batch that is the same at every layout, as Megatron's samplers cut it."""
    tokens = torch.randint(0, vocab, (global_batch, seq + 1), generator=torch.Generator().manual_seed(step))
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return iter(tokens.split(micro_batch)[rank::size])


def forward_masked(iterator: Any, model: Any) -> Any:
    tokens = next(iterator).to(device())
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    # Of every sequence another number of tokens counts.
    mask = (torch.arange(x.shape[1], device=x.device) > y[:, :1] % (x.shape[1] - 1)) & (y % 5 != 0)
    positions = torch.arange(x.shape[1], device=x.device).expand_as(x)
    own = of_this_cp_rank({"x": x, "positions": positions, "y": y, "mask": mask})
    return model(own["x"], own["positions"], None, labels=own["y"]), partial(masked_loss, own["mask"])


def of_this_cp_rank(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Megatron's cut; before 0.16 it takes no group, and from 0.18 on without one it cuts for all ranks."""
    settings = {"cp_group": parallel_state.get_context_parallel_group(), "is_hybrid_cp": False}
    known = inspect.signature(get_batch_on_this_cp_rank).parameters
    return get_batch_on_this_cp_rank(batch, **{name: value for name, value in settings.items() if name in known})


def masked_loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    masked = losses.float() * mask
    return masked.sum(), mask.sum().int(), masked.detach().clone()


def of_all_data_ranks(losses: list[torch.Tensor], micro_batch: int) -> list[float]:
    """Every sequence's loss, in the order of the global batch."""
    own = [[math.fsum(row) for row in whole_sequences(micro).tolist()] for micro in losses]
    group = parallel_state.get_data_parallel_group()
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, own, group=group)
    return [loss for step in zip(*every, strict=True) for micro in step for loss in micro]


def whole_sequences(x: torch.Tensor) -> torch.Tensor:
    """[b, s] of which every context-parallel rank has two runs of tokens, as `get_batch_on_this_cp_rank` deals them."""
    group = parallel_state.get_context_parallel_group()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    halves = [part.chunk(2, 1) for part in parts] if len(parts) > 1 else [(x, x[:, :0])]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], 1)


def forward_step(iterator: Any, model: Any) -> Any:
    tokens = next(iterator).to(device())
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(x.shape[1], device=x.device).expand_as(x)
    return model(x, positions, None, labels=y), partial(mean_loss, y.numel())


def mean_loss(count: int, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = losses.float().sum() / count
    return loss, loss.detach().clone()


def whole(parameter: Any, value: torch.Tensor | None, default: torch.Tensor | None = None) -> torch.Tensor:
    """The logical tensor behind this rank's shard, gathered over tensor-parallel ranks."""
    shard = value if value is not None else default
    assert shard is not None
    group = parallel_state.get_tensor_model_parallel_group()
    if hasattr(parameter, "of_an_expert"):
        group = parallel_state.get_expert_tensor_parallel_group()
    if not getattr(parameter, "tensor_model_parallel", False) or group.size() == 1:
        return shard.detach().clone()
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.detach().contiguous(), group=group)
    stride, dim = parameter.partition_stride, parameter.partition_dim
    pieces = [piece.chunk(stride, dim) for piece in shards]
    return torch.cat([piece[i] for i in range(stride) for piece in pieces], dim)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        data = tensors[name].contiguous().view(torch.uint8).cpu().numpy()
        sha.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode() + data.tobytes())
    return sha.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--dtype", default="bf16")
    options = parser.parse_args()
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        os.environ.setdefault(key, value)
    dist.init_process_group("gloo")
    record = train(tp=options.tp, sp=options.sp, dtype=options.dtype)
    if dist.get_rank() == 0:
        print(json.dumps(record))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

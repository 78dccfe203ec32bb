"""The model and its optimizer, built from megatron-core, and one training step with them.

    GPTModel -> Float16Module (bf16) -> DistributedDataParallel -> Adam

A rank holds `vpp` pieces of the model, one unless its pipeline stages are virtual: piece v of pipeline rank r is stage
v * pp + r. Layers are Transformer Engine's or Megatron's local ones (`layers_of`), without fused kernels whose bits
would depend on what happens to be installed. Initial weights are drawn by name, stock runs' too, so that all start
alike.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import layers, model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from packaging.specifiers import SpecifierSet

from patches.call_site import context_group
from patches.megatron import initial_weights
from patches.megatron.moe.refusals import VERSIONS as MIXTURES
from patches.order.chunks import begin_gather
from patches.registry import library_version
from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError
from tpcheck.run.dtypes import DTYPES

__all__ = [
    "attention_backend",
    "build_model",
    "build_optimizer",
    "global_mean",
    "layers_of",
    "learning_rate",
    "seed_everything",
    "set_learning_rate",
    "train_step",
    "transformer_config",
]


def layers_of(config: RunConfig) -> Literal["te", "local"]:
    """Whose layers the model is made of; `TpcheckError` where they are not there."""
    found = find_spec("transformer_engine") is not None
    if config.layers == "te" and not found:
        raise TpcheckError("layers=te needs Transformer Engine, which is not installed: use layers=local")
    return config.layers or ("te" if found and torch.cuda.is_available() and not config.model.experts else "local")


def transformer_config(config: RunConfig) -> TransformerConfig:
    """The run's model in megatron-core's terms; `TpcheckError` with megatron-core's reason if it refuses."""
    model, dtype = config.model, DTYPES[config.dtype]
    if config.gradient_accumulation_fusion and config.strategy == "stock" and not layers._grad_accum_fusion_available:
        raise TpcheckError("gradient_accumulation_fusion needs Apex's fused_weight_gradient_mlp_cuda: set it false")
    found = library_version("megatron-core")
    if model.experts and (found is None or not SpecifierSet(MIXTURES).contains(found, prereleases=True)):
        raise TpcheckError(f"experts need megatron-core {MIXTURES}, not {found}: install one, or train without them")
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    try:
        return TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            kv_channels=model.head_dim,
            ffn_hidden_size=model.ffn_hidden_size,
            normalization=model.normalization,
            layernorm_epsilon=model.norm_eps,
            qk_layernorm=model.qk_layernorm,
            gated_linear_unit=model.activation == "swiglu",
            activation_func=torch.nn.functional.silu if model.activation == "swiglu" else torch.nn.functional.gelu,
            add_bias_linear=model.bias,
            init_method_std=model.init_std,
            hidden_dropout=model.dropout,
            attention_dropout=model.dropout,
            tensor_model_parallel_size=config.tp,
            sequence_parallel=config.sequence_parallel and config.tp > 1,
            context_parallel_size=config.cp,
            pipeline_model_parallel_size=config.pp,
            virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
            overlap_p2p_comm=config.vpp > 1,  # a batch mixes up what two ranks send each other in both directions
            batch_p2p_comm=config.vpp == 1,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=config.dtype == "bf16",
            use_cpu_initialization=True,
            gradient_accumulation_fusion=config.gradient_accumulation_fusion,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            apply_rope_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            finalize_model_grads_func=finalize_model_grads,
            calculate_per_token_loss=config.order_free,
            attention_backend=_attention_asked_for(config),
            **(recompute if config.recompute else {}),
            **_expert_settings(config),
        )
    except (AssertionError, ValueError, ImportError) as error:
        raise TpcheckError(f"megatron-core refuses this model: {error}") from error


def _expert_settings(config: RunConfig) -> dict[str, Any]:
    experts = config.model.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.number,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_score_function": experts.score,
        "moe_router_pre_softmax": experts.per_token == 1 and experts.score == "softmax",
        "moe_router_dtype": experts.router_dtype,
        "moe_router_load_balancing_type": "seq_aux_loss" if experts.balance_loss else "none",
        "moe_aux_loss_coeff": experts.balance_loss,
        "moe_z_loss_coeff": experts.z_loss or None,
        "moe_router_enable_expert_bias": experts.bias_update_rate > 0,
        "moe_router_bias_update_rate": experts.bias_update_rate,
        "moe_expert_capacity_factor": experts.capacity_factor,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_token_dispatcher_type": experts.dispatcher,
        "moe_grouped_gemm": layers_of(config) == "te",
        "expert_model_parallel_size": config.ep,
        "expert_tensor_parallel_size": config.expert_tp,
    }


def build_model(config: RunConfig, settings: TransformerConfig) -> tuple[list[GPTModel], list[DistributedDataParallel]]:
    """The bare pieces of the model that this rank holds, whose state is saved, and the same as they are trained.

    Args:
        settings: `transformer_config(config)`.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed_optimizer,
        check_for_nan_in_grad=True,
    )
    pieces = [_build_piece(config, settings, virtual_stage) for virtual_stage in range(config.vpp)]
    modules = [Float16Module(settings, piece) if config.dtype == "bf16" else piece for piece in pieces]
    return pieces, [DistributedDataParallel(settings, ddp_config, module) for module in modules]


def _build_piece(config: RunConfig, settings: TransformerConfig, virtual_stage: int) -> GPTModel:
    model = config.model
    stage = virtual_stage * config.pp + parallel_state.get_pipeline_model_parallel_rank()
    stages = config.pp * config.vpp
    if layers_of(config) == "te":
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=model.experts and model.experts.number,
            moe_grouped_gemm=settings.moe_grouped_gemm,
            qk_layernorm=model.qk_layernorm,
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=model.experts and model.experts.number,
            qk_layernorm=model.qk_layernorm,
            normalization=model.normalization,
        )
    seed_everything(config.seed)
    with initial_weights.by_name():
        piece = GPTModel(
            settings,
            spec,
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.max_positions,
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            position_embedding_type="rope" if model.positions == "rope" else "learned_absolute",
            rotary_base=model.rope_base,
            share_embeddings_and_output_weights=model.tied,
            parallel_output=True,
            vp_stage=virtual_stage if config.vpp > 1 else None,
        )
    piece.cuda()
    return piece


def _attention_asked_for(config: RunConfig) -> AttnBackend:
    """What TE shall choose: under the patches unfused, if the run file names no other (none of blockwise's concern)."""
    if layers_of(config) == "local":
        if config.attention in ("flash", "fused"):
            raise TpcheckError(
                f"attention={config.attention} is Transformer Engine's: use layers=te, on a GPU that has it"
            )
        return AttnBackend.auto
    if config.strategy == "stock":
        return AttnBackend[config.attention or "auto"]
    return AttnBackend[config.attention if config.attention in ("flash", "fused") else "unfused"]


def attention_backend(config: RunConfig) -> str:
    """What computed attention in the last step; TE decides for itself, so it is asked, not the configuration."""
    if config.attention_on(torch.cuda.is_available()) == "blockwise":
        return "blockwise"
    if layers_of(config) == "local":
        return "megatron"
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    chosen = dot_product_attention._attention_backends
    for name in ("flash", "fused", "unfused"):
        if chosen.get(f"use_{name}_attention"):
            return f"te {name}"
    return "te, unknown"


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def build_optimizer(config: RunConfig, pieces: list[DistributedDataParallel]) -> Any:
    """Megatron's Adam with its gradient norm, clipping and float32 main parameters."""
    settings = config.optimizer
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=config.dtype == "bf16",
            params_dtype=DTYPES[config.dtype],
            use_distributed_optimizer=config.distributed_optimizer,
        ),
        pieces,
    )


def learning_rate(config: RunConfig, step: int) -> float:
    """The rate of `step` (counted from 0): linear warm-up to lr, then half a cosine down to min_lr."""
    settings = config.optimizer
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    span = max(1, (settings.decay_steps or config.steps) - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(config: RunConfig, optimizer: Any, step: int) -> float:
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = config.optimizer.weight_decay * group.get("wd_mult", 1.0)
    return rate


def train_step(
    config: RunConfig, pieces: list[DistributedDataParallel], optimizer: Any, batches: list[torch.Tensor]
) -> tuple[float, float]:
    """One step on this rank's microbatches: the global batch's mean loss, and the gradient norm."""
    for piece in pieces:
        piece.zero_grad_buffer()
    optimizer.zero_grad()
    iterators = [iter(batches) for _ in pieces]
    losses = get_forward_backward_func()(
        forward_step_func=functools.partial(_forward, _sum_of_losses if config.order_free else _mean_loss),
        data_iterator=iterators if config.vpp > 1 else iterators[0],
        model=pieces,
        num_microbatches=len(batches),
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        forward_only=False,
    )
    _, grad_norm, _ = optimizer.step()
    return _from_last_stage(losses), float(grad_norm)


def _forward(loss: Any, batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(batches).cuda()
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    own = _of_this_cp_rank({"inputs": inputs, "positions": positions, "labels": labels})
    return model(own["inputs"], own["positions"], None, labels=own["labels"]), loss


def _of_this_cp_rank(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Megatron's cut; before 0.16 it takes no group, and from 0.18 on without one it cuts for all ranks."""
    settings = {"cp_group": parallel_state.get_context_parallel_group(), "is_hybrid_cp": False}
    known = inspect.signature(get_batch_on_this_cp_rank).parameters
    own: dict[str, torch.Tensor] = get_batch_on_this_cp_rank(
        batch, **{name: value for name, value in settings.items() if name in known}
    )
    return own


def _mean_loss(token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return token_losses.float().mean(), token_losses.detach().float()


def _sum_of_losses(token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Megatron divides its gradient by the tokens of the global batch, once; float64 holds the sum of float32 losses
    exactly, in whatever micro-batches they come."""
    tokens = torch.tensor(token_losses.numel(), dtype=torch.int32, device=token_losses.device)
    return token_losses.double().sum(), tokens, token_losses.detach().float()


def global_mean(losses: list[torch.Tensor]) -> float:
    """The mean of all token losses of all data-parallel ranks, as a float32.

    `fsum` rounds a sum once whatever its order, so samples may sit in any microbatch of any rank.
    """
    samples = _whole_sequences(torch.cat(losses)).cpu()
    sums = torch.tensor([math.fsum(row) for row in samples.tolist()], dtype=torch.float64).cuda()
    group = parallel_state.get_data_parallel_group()
    gathered = [torch.empty_like(sums) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, sums, group=group)
    every = torch.cat(gathered)
    mean = math.fsum(every.tolist()) / (len(every) * samples.shape[1])
    return torch.tensor(mean, dtype=torch.float32).item()


def _whole_sequences(losses: torch.Tensor) -> torch.Tensor:
    """[samples, s] of all context-parallel ranks' [samples, s/c], token by token."""
    group = context_group()
    return losses if group is None else begin_gather(losses.t(), group).wait().t()


def _from_last_stage(losses: list[torch.Tensor]) -> float:
    """The global mean on every rank; only the last pipeline stage has losses."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return global_mean(losses)
    mean = torch.tensor([global_mean(losses) if losses else 0.0], dtype=torch.float64).cuda()
    torch.distributed.broadcast(mean, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return mean.item()

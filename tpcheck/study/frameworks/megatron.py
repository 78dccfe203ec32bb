"""The same model in megatron-core, stock or patched, from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tpcheck.study.frameworks.hugging_face import language_model
from tpcheck.study.frameworks.names import from_hugging_face
from tpcheck.study.frameworks.recipe import Ready, Recipe
from tpcheck.study.megatron import begin, own_share

__all__ = ["megatron"]


def megatron(recipe: Recipe) -> Ready:
    """Megatron's GPTModel, DDP and Adam. float32 weights are kept beside bfloat16 ones, whatever is asked for."""
    begin(recipe.strategy, recipe.tp)
    config, bf16 = _config(recipe), recipe.precision != "fp32"
    gpt = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=recipe.sizes["vocab_size"],
        max_sequence_length=32768, position_embedding_type="rope", rotary_base=1_000_000,
        share_embeddings_and_output_weights=True,
    )  # fmt: skip
    _load(gpt, language_model(recipe), recipe)
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), Float16Module(config, gpt) if bf16 else gpt
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=recipe.lr, weight_decay=0.0, bf16=bf16, params_dtype=config.params_dtype,
                        clip_grad=recipe.clip),
        [ddp],
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr

    def step(ids: Tensor) -> tuple[float, float]:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        (loss,) = get_forward_backward_func()(
            forward_step_func=_forward, data_iterator=iter([ids]), model=[ddp], num_microbatches=1,
            seq_length=ids.shape[1], micro_batch_size=ids.shape[0], forward_only=False,
        )  # fmt: skip
        _, norm, _ = optimizer.step()
        return float(loss), float(norm or 0.0)

    return Ready([ddp], step)


def _config(recipe: Recipe) -> TransformerConfig:
    sizes, dtype = recipe.sizes, torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    return TransformerConfig(
        num_layers=2, hidden_size=sizes["hidden_size"], ffn_hidden_size=sizes["intermediate_size"],
        num_attention_heads=sizes["num_attention_heads"], num_query_groups=sizes["num_key_value_heads"],
        normalization="RMSNorm", layernorm_epsilon=1e-6, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, add_qkv_bias=True, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=recipe.tp, params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, apply_rope_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip


def _load(gpt: GPTModel, model: Any, recipe: Recipe) -> None:
    """Put this rank's share of Hugging Face's weights into Megatron's."""
    given = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in gpt.named_parameters():
        whole = from_hugging_face(name, given.__getitem__, recipe.sizes, torch.cat)
        parameter.data.copy_(own_share(parameter, whole))


def _forward(samples: Iterator[Tensor], model: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """As Hugging Face's: all but each sample's last word predict the next."""
    ids = next(samples)
    labels = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return model(ids, positions, None, labels=labels), partial(_mean, ids.shape[0] * (ids.shape[1] - 1))


def _mean(count: int, losses: Tensor) -> tuple[Tensor, Tensor]:
    loss = losses[:, :-1].float().sum() / count
    return loss, loss.detach().clone()

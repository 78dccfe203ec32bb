"""What the promise does not cover is refused by name when it is first met, with the way out."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, muon
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

import patches
from patches.megatron.refusals import check_config
from tests.support import plain_megatron
from tests.support.ranks import on_ranks

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"model": {"hidden_dropout": 0.1}}, "hidden_dropout=0.1"),
    "attention dropout": ({"model": {"attention_dropout": 0.1}}, "attention_dropout=0.1"),
    "fp8": ({"model": {"fp8": "hybrid"}}, "fp8='hybrid'"),
    "experts": (
        {"model": {"num_moe_experts": 2, "add_bias_linear": False}},
        "num_moe_experts=2 is not covered by batch='ordered', .*: set batch='order-free'",
    ),
    "latent attention": ({"model": {"multi_latent_attention": True}}, "multi_latent_attention=True"),
    "normalization": ({"model": {"normalization": "L2Norm"}}, "normalization='L2Norm'"),
    "activation": ({"model": {"activation_func": torch.nn.functional.celu}}, "celu.* is not covered: use one of silu"),
    "uninitialised weights": ({"model": {"perform_initialization": False}}, "perform_initialization=False"),
    "transformer engine's cross-entropy": (
        {"model": {"cross_entropy_fusion_impl": "te"}},
        "cross_entropy_fusion_impl='te'",
    ),
    "fp16": ({"model": {"fp16": True}, "dtype": "fp32"}, "fp16=True"),
    "attention sinks": ({"model": {"softmax_type": "off-by-one"}}, "softmax_type='off-by-one' is not covered"),
    "clipped queries and keys": ({"model": {"qk_clip": True}}, "qk_clip=True is not covered"),
    "batch-invariant kernels": (
        {"model": {"batch_invariant_mode": True, "attention_backend": AttnBackend.flash}},
        "batch_invariant_mode=True is not covered",
    ),
}


# Where sums over the batch have no order.
REFUSED_ORDER_FREE: dict[str, tuple[dict[str, Any], str]] = {
    "means of micro-batches": ({"global_batch": None}, "calculate_per_token_loss=False .*--calculate-per-token-loss"),
    "multi-token prediction": (
        {"model": {"mtp_num_layers": 1}},
        "mtp_num_layers=1 is not covered by batch='order-free'",
    ),
    "fused biases of a gated MLP": (
        {"model": {"add_bias_linear": True, "bias_activation_fusion": True}},
        "bias_activation_fusion=True .*--no-bias-swiglu-fusion",
    ),
    "NCCL's user buffers": ({"ddp": {"nccl_ub": True}}, "nccl_ub=True is not covered by batch='order-free'"),
}


def train(options: dict[str, Any], batch: patches.Batch = "ordered") -> None:
    patches.enable(batch=batch)
    plain_megatron.train(**options)


@pytest.mark.parametrize("name", REFUSED_ORDER_FREE)
def test_setting_is_refused_by_name_where_the_batch_has_no_order(name):
    options, message = REFUSED_ORDER_FREE[name]
    with pytest.raises(AssertionError, match=message):
        on_ranks(1, train, {"global_batch": 4, **options}, "order-free")


@pytest.mark.parametrize("name", REFUSED)
def test_setting_is_refused_by_name(name):
    options, message = REFUSED[name]
    with pytest.raises(AssertionError, match=message):
        on_ranks(1, train, options)


# Of a model that is cut into two pipeline stages.
REFUSED_IN_A_PIPELINE: dict[str, tuple[dict[str, Any], str]] = {
    "tied embeddings": (
        {"tied": True},
        "share_embeddings_and_output_weights=True with pipeline_model_parallel_size=2 .*batch='order-free'.*set it to",
    ),
    "multi-token prediction": (
        {"model": {"mtp_num_layers": 1}},
        "mtp_num_layers=1 with pipeline_model_parallel_size=2 is not covered.*: set it to None",
    ),
}


@pytest.mark.parametrize("name", REFUSED_IN_A_PIPELINE)
def test_setting_is_refused_by_name_in_a_pipeline(name):
    options, message = REFUSED_IN_A_PIPELINE[name]
    options = {"pp": 2, **options, "model": {"num_layers": 2, **options.get("model", {})}}
    with pytest.raises(AssertionError, match=message):
        on_ranks(2, train, options)


class RMSNorm(torch.nn.Module):
    __module__ = "transformer_engine.pytorch.module.rmsnorm"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()


def norm_of_transformer_engine(spec: Any) -> None:
    spec.submodules.self_attention.submodules.q_layernorm = RMSNorm


def dropout_of_a_layer(spec: Any) -> None:
    spec.params["hidden_dropout"] = 0.1


def dropout_of_attention(spec: Any) -> None:
    core = spec.submodules.self_attention.submodules.core_attention
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(core, params={"attention_dropout": 0.1})


def build_layer(change: Any) -> None:
    patches.enable()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(**{**plain_megatron.SHARED, **plain_megatron.QWEN3})
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    change(spec)
    build_module(spec, config=config)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (norm_of_transformer_engine, "attention.q_layernorm is a transformer_engine.pytorch.module.rmsnorm.RMSNorm"),
        (dropout_of_a_layer, "hidden_dropout=0.1 of a layer is not covered: set it to 0"),
        (dropout_of_attention, "self_attention.core_attention.attention_dropout is a Dropout of 0.1, which is not"),
    ),
)
def test_what_a_layer_is_made_of_is_refused_by_name(change, message):
    with pytest.raises(AssertionError, match=message):
        on_ranks(1, build_layer, change)


def optimize(**settings: Any) -> None:
    patches.enable()
    config = OptimizerConfig()
    for name, value in settings.items():  # given to the constructor, some of them need Transformer Engine
        setattr(config, name, value)
    FP32Optimizer(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1), config, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"optimizer": "muon"}, "optimizer='muon'"),
        ({"fp16": True}, "fp16"),
        ({"optimizer_cpu_offload": True}, "optimizer_cpu_offload=True .*without --optimizer-cpu-offload"),
        (
            {"overlap_param_gather_with_optimizer_step": True},
            "overlap_param_gather_with_optimizer_step=True .*the gradient norm is then one of norms of virtual stages",
        ),
        ({"optimizer_cuda_graph": True}, "optimizer_cuda_graph=True is not covered"),
        ({"exp_avg_dtype": torch.float16}, "exp_avg_dtype=torch.float16 .*without --exp-avg-dtype"),
        ({"exp_avg_sq_dtype": torch.uint8}, "exp_avg_sq_dtype=torch.uint8 is not covered"),
        ({"main_params_dtype": torch.float16}, "main_params_dtype=torch.float16 is not covered"),
    ),
)
def test_optimizer_is_refused_by_name(settings, message):
    with pytest.raises(AssertionError, match=message):
        on_ranks(1, lambda: optimize(**settings))


class Muon(torch.optim.SGD):
    """In the place of Megatron's, which is made of a package that is not installed here."""

    def __init__(self, groups: Any, lr: float, **settings: Any) -> None:
        super().__init__(groups, lr)


def muon_that_calls_itself_adam() -> None:
    def optimizer(config: OptimizerConfig, chunks: Any) -> Any:
        config.optimizer = "muon"
        return muon.get_megatron_muon_optimizer(config, chunks)

    muon.HAVE_EMERGING_OPTIMIZERS, muon.TensorParallelMuon = True, Muon
    plain_megatron.get_megatron_optimizer = optimizer
    patches.enable()
    plain_megatron.train()


def test_optimizer_is_refused_that_megatron_calls_adam():
    """It orthogonalises a rank's shard, or picks its products by its shape."""
    with pytest.raises(AssertionError, match="Muon is not covered: use Adam, AdamW.*--optimizer adam"):
        on_ranks(1, muon_that_calls_itself_adam)


def megatrons(name: str, module: str) -> None:
    patches.enable()
    cls = type(name, (MegatronModule,), {"__module__": f"megatron.core.{module}"})  # Megatron's own wants mamba-ssm
    cls(TransformerConfig(**{**plain_megatron.SHARED, **plain_megatron.QWEN3}))


@pytest.mark.parametrize(
    ("name", "module"),
    (("MambaMixer", "ssm.mamba_mixer"), ("GatedDeltaNet", "ssm.gated_delta_net"), ("HybridModel", "models.hybrid")),
)
def test_state_space_layers_and_their_models_are_refused_by_name(name, module):
    with pytest.raises(AssertionError, match=f"{module}.{name} is not covered: build a GPTModel"):
        on_ranks(1, megatrons, name, module)


@pytest.mark.parametrize("batch", ("ordered", "order-free"))
def test_embedder_of_conditions_is_refused_by_name(batch):
    with patches.enabled(batch=batch), pytest.raises(patches.UnsupportedError, match="has_cond_embedder=True is not"):
        check_config(SimpleNamespace(has_cond_embedder=True, calculate_per_token_loss=True))


def train_in_autocast() -> None:
    patches.enable()
    with torch.autocast("cpu", torch.bfloat16):
        plain_megatron.train(dtype="fp32")


def test_autocast_is_refused_by_name():
    with pytest.raises(AssertionError, match="torch.autocast is not covered: make the parameters bf16"):
        on_ranks(1, train_in_autocast)


def smoothed_loss() -> None:
    import torch
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    patches.enable()
    vocab_parallel_cross_entropy(torch.zeros(2, 1, 4), torch.zeros(2, 1, dtype=torch.long), 0.1)


def test_label_smoothing_is_refused_by_name():
    with pytest.raises(AssertionError, match="label_smoothing=0.1 is not covered"):
        on_ranks(1, smoothed_loss)


def test_several_distributed_optimizer_instances_are_refused_by_name():
    from patches.megatron.param_and_grad_buffer import _start_grad_sync

    group = SimpleNamespace(ddp_config=SimpleNamespace(num_distributed_optimizer_instances=2))
    with pytest.raises(patches.UnsupportedError, match="num_distributed_optimizer_instances > 1 is not covered: use 1"):
        _start_grad_sync(None)(group)


@pytest.mark.parametrize(
    ("module", "cls", "flag"),
    (
        ("fsdp.mcore_fsdp_adapter", "FullyShardedDataParallel", "--use-megatron-fsdp"),
        ("torch_fully_sharded_data_parallel", "TorchFullyShardedDataParallel", "--use-torch-fsdp2"),
    ),
)
def test_fully_sharded_data_parallelism_is_refused_by_flag(module, cls, flag):
    distributed = importlib.import_module(f"megatron.core.distributed.{module}")
    with patches.enabled(), pytest.raises(patches.UnsupportedError, match=f"is not covered.*without {flag}"):
        getattr(distributed, cls)(None, None, None)

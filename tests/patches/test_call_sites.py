"""Call sites in versions of megatron-core that this Python cannot install: here they are read, not run.

`make test-megatron` unpacks their wheels and names the folders, separated by colons, in MEGATRON_SOURCES.
"""

from __future__ import annotations

import ast
import functools
import os
import re
from importlib.metadata import Distribution
from pathlib import Path

import pytest

import patches
from patches.megatron import refusals
from patches.megatron.moe.refusals import COVERED
from patches.registry import SUPPORTED, Patch

FOLDERS = [Path(folder) for folder in os.environ.get("MEGATRON_SOURCES", "").split(":") if folder]
IN_MEGATRON = [patch for patch in patches._all_patches() if patch.target.startswith("megatron.core")]

pytestmark = pytest.mark.skipif(not FOLDERS, reason="MEGATRON_SOURCES names no folder: make test-megatron")


def version_in(folder: Path) -> str:
    return next(iter(Distribution.discover(name="megatron-core", path=[str(folder)]))).version


@functools.cache
def parsed(folder: Path, module: str) -> ast.Module:
    path = folder.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def find(folder: Path, module: str, names: list[str]) -> ast.AST:
    """The definition of `module:names`, followed through imports."""
    scope: ast.AST = parsed(folder, module)
    for depth, name in enumerate(names):
        for node in ast.walk(scope):
            if node is not scope and named(node) == name:
                found: ast.AST = node
                break
            if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
                origin = next(a.name for a in node.names if (a.asname or a.name) == name)
                return find(folder, absolute(module, node), [origin, *names[depth + 1 :]])
        else:
            raise LookupError(f"{module} has no {'.'.join(names)}")
        scope = found
    return scope


def named(node: ast.AST) -> str | None:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None


def absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    return ".".join([*module.split(".")[: -node.level], *([node.module] if node.module else [])])


@pytest.mark.parametrize("patch", IN_MEGATRON, ids=lambda patch: patch.name)
@pytest.mark.parametrize("folder", FOLDERS, ids=version_in)
def test_call_site_is_where_the_patch_looks_and_takes_known_parameters(folder: Path, patch: Patch):
    if not patch.versions.contains(version_in(folder), prereleases=True):
        pytest.skip(f"{patch.name} is for megatron-core {patch.versions}")
    module, _, qualname = patch.target.partition(":")
    definition = find(folder, module, qualname.split("."))
    if patch.parameters is not None:
        assert isinstance(definition, ast.FunctionDef)
        spec = definition.args
        taken = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
        assert {arg.arg for arg in taken} <= {*patch.parameters, "self", "cls", "ctx"}


# Settings of mixtures that are covered at any value or checked with others, of what is refused itself (flex
# dispatchers, paged stashes, quantiles), of inference or of logs.
SETTLED = set(
    """
    expert_model_parallel_size expert_tensor_parallel_size expert_tensor_parallel_num_weight_shards num_moe_experts
    moe_aux_loss_coeff moe_expert_capacity_factor moe_ffn_hidden_size moe_grad_scale_func moe_grouped_gemm
    moe_layer_freq moe_layer_recompute moe_router_bias_update_rate moe_router_enable_expert_bias moe_router_group_topk
    moe_router_load_balancing_type moe_router_num_groups moe_router_padding_for_fp8 moe_router_pre_softmax
    moe_router_topk moe_router_topk_scaling_factor moe_shared_expert_gate moe_shared_expert_intermediate_size
    moe_single_grouped_bias moe_token_drop_policy moe_token_dropping moe_z_loss_coeff
    moe_deepep_num_sms moe_enable_deepep moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms
    moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms
    moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs moe_ncclep_static_shape
    moe_ncclep_zero_copy moe_permute_fusion_into_hybridep moe_paged_stash_buffer_size_factor_cpu
    moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size moe_router_quantile_balancing_ema
    moe_shared_expert_glu_interleave_size
    inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
    moe_pad_experts_for_cuda_graph_inference moe_per_layer_logging
    """.split()
)
# Settings that are covered at any value or checked where they are used, change no bit, or are of no use in training.
KNOWN = set(
    """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split activation_func
    activation_func_clamp_value activation_func_fp8_input_store add_qkv_bias apply_query_key_layer_scaling
    apply_residual_connection_post_layernorm apply_rope_fusion attention_backend attention_output_gate
    attention_softmax_in_fp32 bias_activation_fusion bias_dropout_fusion clone_scatter_output_in_embedding
    config_logger_dir cp_comm_type disable_bf16_reduced_precision_matmul disable_parameter_transpose_cache
    distribute_saved_activations embedding_init_method embedding_init_method_std ffn_hidden_size
    first_last_layers_bf16 flash_attention_version flash_decode fp32_residual_connection fused_residual_rmsnorm
    fused_single_qkv_rope gated_linear_unit glu_linear_offset hetereogenous_dist_checkpoint
    heterogeneous_block_specs hidden_size high_priority_a2a_comm_stream init_method init_method_std
    init_model_with_meta_device is_hybrid_model kv_channels layernorm_epsilon layernorm_zero_centered_gamma
    log_max_attention_logit masked_softmax_fusion memory_efficient_layer_norm mlp_chunks_for_prefill mrope_section
    mtp_detach_heads mtp_hybrid_override_pattern mtp_loss_scaling_factor mtp_use_repeated_layer mup_attn_scale_power
    mup_base_head_dim mup_base_hidden_size mup_embedding_mult mup_output_mult mup_width_mult
    nccl_all_reduce_for_prefill no_rope_freq normalization num_attention_heads num_layers num_layers_at_end_in_bf16
    num_layers_at_start_in_bf16 num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    num_query_groups output_layer_init_method persist_layer_norm pipeline_model_parallel_layout qk_l2_norm
    qk_layernorm quant_recipe recompute_granularity recompute_method recompute_modules recompute_num_layers
    rotary_interleaved softmax_scale test_mode tp_only_amax_red transformer_impl use_fused_weighted_squared_relu
    use_grouped_gemm_for_dense_mlp use_inference_optimized_layers use_kitchen use_kitchen_attention use_mup
    use_te_rng_tracker window_attn_skip_freq window_size kitchen_attention_backend use_mamba_mem_eff_path
    activation_offload_fraction delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
    fine_grained_offloading_max_inflight_offloads min_offloaded_tensor_size offload_modules

    autocast_dtype barrier_with_L1_time batch_p2p_comm batch_p2p_sync bf16 cross_entropy_loss_fusion
    deallocate_pipeline_outputs defer_embedding_wgrad_compute deterministic_mode enable_autocast
    ep_overlap_early_attn_memory_release finalize_model_grads_func grad_scale_func grad_sync_func
    gradient_accumulation_fusion max_seqlen_per_dp_cp_rank microbatch_group_size_per_vp_stage mtp_grad_scale_func
    mtp_standalone no_sync_func num_microbatches_with_partial_activation_checkpoints overlap_p2p_comm
    overlap_p2p_comm_warmup_flush param_sync_func params_dtype pipeline_dtype pipeline_model_parallel_comm_backend
    pipeline_model_parallel_size sequence_parallel tensor_model_parallel_size tensor_parallel_num_weight_shards timers
    use_cpu_initialization use_ring_exchange_p2p variable_seq_lengths virtual_pipeline_model_parallel_size
    wgrad_deferral_limit _cpu_offloading_context async_tensor_model_parallel_allreduce moe_extended_tp

    align_param_gather average_in_collective bucket_size check_for_large_grads check_for_nan_in_grad
    data_parallel_sharding_strategy disable_symmetric_registration grad_reduce_in_fp32 gradient_reduce_div_fusion
    keep_fp8_transpose_cache nccl_ub num_buckets num_distributed_optimizer_instances outer_dp_sharding_strategy
    overlap_grad_reduce overlap_param_gather pad_buckets_for_high_nccl_busbw preserve_fp32_weights
    param_name_patterns_for_fp32_local_accumulation reduce_scatter_with_fp32_accumulation
    reuse_grad_buf_for_mxfp8_param_ag suggested_communication_unit_size use_custom_fsdp use_distributed_optimizer
    use_megatron_fsdp

    adam_beta1 adam_beta2 adam_eps apply_wd_to_qk_layernorm clip_grad decoupled_lr decoupled_min_lr
    decoupled_weight_decay exp_avg_dtype exp_avg_sq_dtype grad_norm_skip_threshold hysteresis initial_loss_scale
    log_num_zeros_in_grad loss_scale loss_scale_window lr main_grads_dtype main_params_dtype min_loss_scale min_lr
    optimizer optimizer_cpu_offload optimizer_cuda_graph optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d
    overlap_param_gather_with_optimizer_step pin_cpu_grads pin_cpu_params sgd_momentum store_param_remainders
    use_layer_wise_distributed_optimizer use_precision_aware_optimizer use_torch_optimizer_for_cpu_offload
    weight_decay
    """.split()
)
# Beginnings of names whose settings say more of something that is refused, or is none of training.
OF_OTHERS = (
    "fp8_|fp4_|dsa_|mamba_|linear_|muon_|adaptive_muon_|lion_|soap_|qk_clip_|cuda_graph_|tp_comm_|cpu_offloading_|"
    "fsdp_|megatron_fsdp_|inference_|experimental_attention_variant_"
)
CONFIGS = {
    "megatron.core.transformer.transformer_config": "TransformerConfig",
    "megatron.core.model_parallel_config": "ModelParallelConfig",
}
MORE_CONFIGS = {
    "megatron.core.distributed.distributed_data_parallel_config": "DistributedDataParallelConfig",
    "megatron.core.optimizer.optimizer_config": "OptimizerConfig",
}


def settings_in(folder: Path, configs: dict[str, str]) -> set[str]:
    return {
        node.target.id
        for module, name in configs.items()
        for node in ast.iter_child_nodes(find(folder, module, [name]))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=version_in)
def test_every_setting_of_mixtures_of_experts_is_refused_or_known(folder: Path):
    of_mixtures = {name for name in settings_in(folder, CONFIGS) if re.search("moe|expert", name)}
    assert len(of_mixtures) > 40
    assert of_mixtures <= COVERED.keys() | SETTLED


@pytest.mark.parametrize("folder", FOLDERS, ids=version_in)
def test_every_setting_is_refused_or_known(folder: Path):
    """What a new version adds is to be looked at before it is called supported."""
    refused = COVERED.keys() | refusals.COVERED.keys() | refusals.COVERED_ORDER_FREE.keys()
    settings = {name for name in settings_in(folder, {**CONFIGS, **MORE_CONFIGS}) if not re.match(OF_OTHERS, name)}
    assert len(settings) > 200
    assert settings <= refused | SETTLED | KNOWN


def test_every_class_that_is_refused_by_name_is_one_of_megatrons():
    files = (file for folder in FOLDERS for file in folder.glob("megatron/core/**/*.py"))
    found = {name for file in files for name in re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.M)}
    assert found >= refusals.UNCOVERED_CLASSES


@pytest.mark.parametrize("folder", FOLDERS, ids=version_in)
def test_version_is_one_that_the_patches_take(folder: Path):
    assert SUPPORTED["megatron-core"].contains(version_in(folder))


@pytest.mark.parametrize("folder", FOLDERS, ids=version_in)
def test_a_missing_call_site_is_noticed(folder: Path):
    with pytest.raises(LookupError):
        find(folder, "megatron.core.tensor_parallel.layers", ["RowParallelLinear", "forwards"])

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
from patches.megatron.moe.refusals import COVERED
from patches.megatron.refusals import UNCOVERED_CLASSES
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
CONFIGS = {
    "megatron.core.transformer.transformer_config": "TransformerConfig",
    "megatron.core.model_parallel_config": "ModelParallelConfig",
}


@pytest.mark.parametrize("folder", FOLDERS, ids=version_in)
def test_every_setting_of_mixtures_of_experts_is_refused_or_known(folder: Path):
    settings = {
        node.target.id
        for module, name in CONFIGS.items()
        for node in ast.iter_child_nodes(find(folder, module, [name]))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    of_mixtures = {name for name in settings if re.search("moe|expert", name)}
    assert len(of_mixtures) > 40
    assert of_mixtures <= COVERED.keys() | SETTLED


def test_every_class_that_is_refused_by_name_is_one_of_megatrons():
    files = (file for folder in FOLDERS for file in folder.glob("megatron/core/**/*.py"))
    found = {name for file in files for name in re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.M)}
    assert found >= UNCOVERED_CLASSES


@pytest.mark.parametrize("folder", FOLDERS, ids=version_in)
def test_version_is_one_that_the_patches_take(folder: Path):
    assert SUPPORTED["megatron-core"].contains(version_in(folder))


@pytest.mark.parametrize("folder", FOLDERS, ids=version_in)
def test_a_missing_call_site_is_noticed(folder: Path):
    with pytest.raises(LookupError):
        find(folder, "megatron.core.tensor_parallel.layers", ["RowParallelLinear", "forwards"])

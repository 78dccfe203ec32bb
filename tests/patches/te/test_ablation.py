"""Each patch of a Transformer Engine call site is needed: with any one left out, some run's bits depend on TP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patches
from patches.registry import REGISTRY, check_versions
from patches.te import PATCHES
from tests.support import plain_megatron
from tests.support.megatron_runs import differences, run
from tests.support.ranks import on_ranks
from tests.support.sharding import gathered
from tests.support.te_modules import Case, one_in_te

ON_DEVICE = {"model": {"use_cpu_initialization": False}}
# Without their own patch, norms run in TE's op fuser, and the sums they leave to Megatron are refused at the end.
REFUSALS = {"te-op-fuser", "finalize-gradients"}

# name: (patches left out with it, TP size that feels it, options)
FEELS_IT: dict[str, tuple[set[str], int, dict[str, Any]]] = {
    "te-linear": (set(), 2, {}),
    "te-layernorm-linear": (set(), 2, {}),
    "te-attention": (set(), 8, {"model": {"num_query_groups": 4}}),
    "te-unfused-attention": (set(), 8, {"model": {"num_query_groups": 4}}),
    "te-softmax": (set(), 4, {"dtype": "bf16", "seq": 32, "micro_batch": 1}),
    "te-rmsnorm": (REFUSALS, 2, {}),
    "te-layernorm": (REFUSALS, 2, {"shape": "gpt2", "sp": True}),
    "te-init-row": (set(), 2, ON_DEVICE),
    "te-init-layernorm-column": (set(), 2, ON_DEVICE),
}
OTHERWISE = {"te-layernorm-mlp", "te-init-column"}  # below
OF_EXPERTS = {"te-grouped-linear", "te-init-grouped-row", "te-init-grouped-column"}  # test_mixture
REFUSING = {"te-flash-attention", "te-fused-attention", "te-op-fuser", "te-cross-entropy"}


def without(names: set[str]) -> None:
    needed = check_versions(patches._all_patches())
    REGISTRY.apply(patches.Contract(), [patch for patch in needed if patch.name not in names])


def training_without(names: set[str], options: dict[str, Any]) -> dict[str, Any]:
    without(names)
    return plain_megatron.train(te=True, **options)


@pytest.mark.parametrize("name", FEELS_IT)
def test_bits_depend_on_tp_without(name):
    others, size, options = FEELS_IT[name]
    options = {"dtype": "fp32", "steps": 1, **options}
    left_out = {name, *others}
    one, other = (on_ranks(tp, training_without, left_out, {"tp": tp, **options})[0] for tp in (1, size))
    assert differences(one, other)
    complete = [run("tree", tp, te=True, **options) for tp in (1, size)]
    assert not differences(*complete)


def mlp_without(names: set[str]) -> dict[str, Tensor]:
    without(names)
    return one_in_te(Case("LayerNormMLP", None), False)


def column_weight_without(names: set[str]) -> Tensor:
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    without(names)
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, tensor_model_parallel_size=size)
    layer = TEColumnParallelLinear(
        16, 32, config=config, init_method=torch.nn.init.normal_, gather_output=False, bias=False, skip_bias_add=False,
        is_expert=False, stride=2,
    )  # fmt: skip
    return gathered(layer.weight.detach(), (0, 2), torch.distributed.group.WORLD)


def test_mlp_has_other_bits_at_another_tp_without_its_patch():
    for names, same in (({"te-layernorm-mlp"}, False), (set(), True)):
        one, two = (on_ranks(tp, mlp_without, names)[0] for tp in (1, 2))
        assert all(torch.equal(one[name], two[name]) for name in one) is same


def test_column_weights_depend_on_tp_without_their_init():
    for names, same in (({"te-init-column"}, False), (set(), True)):
        one, two = (on_ranks(tp, column_weight_without, names)[0] for tp in (1, 2))
        assert torch.equal(one, two) is same


def test_every_patch_is_ablated():
    assert {patch.name for patch in PATCHES} == FEELS_IT.keys() | OTHERWISE | OF_EXPERTS | REFUSING

"""Each patch is needed: with any single one left out, some configuration's bits depend on TP, or it is refused; those
of `batch="order-free"` likewise, on any size of the layout."""

from __future__ import annotations

from typing import Any

import pytest

import patches
from patches.megatron import initial_weights, moe, tokenizer
from patches.registry import check_versions
from tests.support.megatron_runs import differences, run, training_without
from tests.support.ranks import on_ranks

# name: (TP sizes to compare, data-parallel size, options)
FEELS_IT: dict[str, tuple[int, int, dict[str, Any]]] = {
    "local-kernels": (8, 1, {"model": {"ffn_hidden_size": 360}}),
    "gated-fc1": (2, 1, {}),
    "row-parallel": (8, 1, {}),
    "column-parallel": (8, 1, {}),
    "qk-layernorm": (8, 1, {}),
    "shared-kv": (8, 1, {"model": {"num_query_groups": 4}}),
    "cross-entropy": (8, 1, {"vocab": 1000}),
    "fused-cross-entropy": (8, 1, {"vocab": 1016, "model": {"cross_entropy_loss_fusion": True}}),
    "data-parallel-sum": (2, 3, {}),
    "finalize-gradients": (8, 1, {"sp": True}),
    "gradient-norm": (8, 1, {}),
}
REFUSED_WITHOUT = {
    "norms": ({"sp": True}, "input_layernorm.weight is a partial sum of a module that is not covered"),
    "wgrad-fusion": ({"model": {"gradient_accumulation_fusion": True}}, "you must install APEX"),
}
# Those that sums over the batch without an order need: (layout that feels it, options).
ORDER_FREE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "blockwise-attention": ({"cp": 2}, {"chunks": 4}),  # without it, ranks see their own keys alone
    "batch-sums-rounded": ({"pp": 2}, {}),
    "data-parallel-sum": ({"dp": 3}, {"ddp": {"check_for_nan_in_grad": False}}),
}
REFUSED_ORDER_FREE = {
    "batch-sums": ({}, "has no attribute '_patches_totals'"),
    "batch-sums-reset": ({}, "came after the batch's sums had been rounded"),
    "embedding-copies": ({"tied": True, "pp": 2}, "of embedding.word_embeddings.weight differs between ranks"),
    "position-embedding": ({"shape": "gpt2"}, "position_embeddings.weight, or a part of it, is summed by a module"),
    "column-bias": ({"shape": "gpt2"}, "linear_fc1.bias, or a part of it, is summed by a module"),
    "embedding": ({}, "word_embeddings.weight, or a part of it, is summed by a module"),
    "context-parallel": ({"cp": 2, "chunks": 4}, "Context parallelism is only supported by TEDotProductAttention"),
}

ELSEWHERE = {
    "settings",
    "layer-modules",
    "block-modules",
    "optimizer-settings",
    "megatron-fsdp",
    "torch-fsdp",
}  # tests/patches/test_refusals.py
ELSEWHERE |= {"shared-embedding"}  # tests/patches/test_refusals.py
ELSEWHERE |= {"masked-softmax"}  # tests/patches/test_patches.py
ELSEWHERE |= {patch.name for patch in tokenizer.PATCHES}  # tests/patches/megatron/test_tokenizer.py
ELSEWHERE |= {"saved-optimizer"}  # tests/patches/megatron/test_fully_reshardable.py
ELSEWHERE |= {patch.name for patch in initial_weights.PATCHES}  # tests/patches/megatron/test_initial_weights.py
ELSEWHERE |= {"blockwise-attention"}  # whole sequences: tests/patches/megatron/test_blockwise.py
ELSEWHERE |= {"fused-norm"}  # tests/patches/test_patches.py
ELSEWHERE |= {"embedding"}  # tests/patches/kernels: in order, it changes nothing on a CPU
ELSEWHERE |= {"loss-per-token", "zeros-in-gradient"}  # tests/patches/megatron/test_order_free_sums.py
ELSEWHERE |= {patch.name for patch in moe.PATCHES}  # tests/patches/megatron/moe/test_ablation.py
ELSEWHERE |= {"gradient-norm-of-experts"}  # there, too
ELSEWHERE |= {"compiled-functions", "scores-buffer"}  # tests/patches/test_patches.py

PATCHES = [patch for patch in patches._all_patches() if patch.library == "megatron-core"]
NEEDED = check_versions(PATCHES)


def order_free_without(names: set[str], options: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    options = {"tp": 1, "pp": 1, "seq": 16, "global_batch": 12, "micro_batch": 1, **options, **layout}
    options["model"] = {"num_layers": 2}
    ranks = options["pp"] * options.pop("dp", 1) * options.get("cp", 1)
    return on_ranks(ranks, training_without, names, options, "order-free")[0]


@pytest.mark.parametrize("name", [patch.name for patch in NEEDED if patch.name in FEELS_IT])
def test_bits_depend_on_tp_without(name):
    tp, dp, options = FEELS_IT[name]
    options = {"dtype": "fp32", **options}
    one, other = (on_ranks(t * dp, training_without, {name}, {"tp": t, **options})[0] for t in (1, tp))
    assert differences(one, other)
    complete = [run("tree", t, dp=dp, **options) for t in (1, tp)]
    assert not differences(*complete)


@pytest.mark.parametrize("name", ORDER_FREE)
def test_bits_depend_on_the_layout_without(name):
    layout, options = ORDER_FREE[name]
    assert differences(*(order_free_without({name}, options, each) for each in ({}, layout)))
    assert not differences(*(order_free_without(set(), options, each) for each in ({}, layout)))


@pytest.mark.parametrize("name", REFUSED_ORDER_FREE)
def test_order_free_run_is_refused_without(name):
    options, message = REFUSED_ORDER_FREE[name]
    with pytest.raises(AssertionError, match=message):
        order_free_without({name}, options, {})


def test_a_bias_loses_its_gradient_unseen_without_what_looks_at_autograd():
    """Then two patches are missing: each alone is noticed."""
    options = {"shape": "gpt2"}
    found = [order_free_without(names, options, {}) for names in ({"autograd-sums", "column-bias"}, set())]
    assert "step0 gradients/decoder.layers.0.mlp.linear_fc1.bias" in differences(*found)


@pytest.mark.parametrize("name", REFUSED_WITHOUT)
def test_run_is_refused_without(name):
    options, message = REFUSED_WITHOUT[name]
    with pytest.raises(AssertionError, match=message):
        on_ranks(2, training_without, {name}, {"tp": 2, **options})


def test_bits_depend_on_tp_without_norms_even_if_not_refused():
    options = {"dtype": "fp32", "sp": True, "model": {"qk_layernorm": False}}
    names = {"norms", "finalize-gradients"}
    one, other = (on_ranks(t, training_without, names, {"tp": t, **options})[0] for t in (1, 8))
    assert differences(one, other)


def test_every_patch_is_ablated():
    ordered = FEELS_IT.keys() | REFUSED_WITHOUT.keys()
    order_free = ORDER_FREE.keys() | REFUSED_ORDER_FREE.keys() | {"autograd-sums"}
    assert {patch.name for patch in PATCHES} == ordered | order_free | ELSEWHERE

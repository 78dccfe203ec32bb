"""Stock megatron-core under `patches.enable(batch="order-free")`: losses, gradients, gradient norms and float32 main
parameters follow from model, data, seed and global batch alone, and without it from every axis of the layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import patches
from tests.support import plain_megatron
from tests.support.megatron_runs import FULL_RECOMPUTE, assert_same_order_free, differences, run, unlike
from tests.support.ranks import on_ranks

FOUR = {"num_layers": 4}
SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = {"overlap_grad_reduce": True}
BOTH = {**SHARDED, **OVERLAPPED, "overlap_param_gather": True}
FUSIONS = {"bias_activation_fusion": True, "bias_dropout_fusion": True, "cross_entropy_loss_fusion": True}
# Twelve sequences, of each of which another number of tokens counts, in micro-batches of 1 to 6, on 1 to 4 ranks.
BATCH = {"seq": 16, "global_batch": 12, "micro_batch": 1, "steps": 5}

# name: (options, layouts that must have the bits of a single rank with micro-batches of 1)
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "qwen3": (
        {"model": FOUR},
        [
            {"micro_batch": 4},
            {"dp": 3, "micro_batch": 2},
            {"pp": 4, "micro_batch": 3},
            {"pp": 2, "vpp": 2, "micro_batch": 2, "ddp": OVERLAPPED},
            {"tp": 2, "sp": True, "pp": 2, "dp": 2},
            {"dp": 4, "ddp": SHARDED},
            {"dp": 2, "micro_batch": 3, "ddp": BOTH},
            {"tp": 8, "sp": True, "micro_batch": 4},
        ],
    ),
    "qwen3, tied": (
        {"model": FOUR, "tied": True},
        [{"pp": 2, "vpp": 2, "micro_batch": 3}, {"pp": 2, "dp": 3, "ddp": BOTH}, {"tp": 4, "micro_batch": 2}],
    ),
    "gpt-2 shape fp32, tied": (
        {"model": {"num_layers": 2}, "shape": "gpt2", "dtype": "fp32", "tied": True},
        [{"pp": 2, "dp": 2}, {"tp": 2, "sp": True, "micro_batch": 4}, {"dp": 3, "micro_batch": 2, "ddp": SHARDED}],
    ),
    "gpt-2 shape, fusions": (
        {"model": {"num_layers": 2, **FUSIONS}, "shape": "gpt2"},
        [{"tp": 2, "sp": True, "pp": 2, "micro_batch": 6}, {"dp": 2, "micro_batch": 2}],
    ),
    "bf16 gradients": ({"ddp": {"grad_reduce_in_fp32": False}}, [{"dp": 2, "micro_batch": 3}]),
    "full recompute, four KV groups fp32": (
        {"model": {"num_layers": 2, "num_query_groups": 4, **FULL_RECOMPUTE}, "dtype": "fp32"},
        [{"tp": 4, "sp": True, "micro_batch": 4}, {"pp": 2, "dp": 2, "micro_batch": 2}],
    ),
}
SHARES = ("tp", "pp", "vpp", "dp", "micro_batch")
EVERY = [
    dict(zip(SHARES, sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2), (1, 2, 3, 4), (1, 2, 4))
    if sizes[0] * sizes[1] * sizes[3] <= 8  # ranks
    and sizes[1] * sizes[2] <= 4  # layers
    and (sizes[2] == 1 or sizes[1] > 1)
    and 12 % (sizes[3] * sizes[4]) == 0
    and (sizes[2] == 1 or 12 // (sizes[3] * sizes[4]) % sizes[1] == 0)
]


@pytest.mark.parametrize("name", CASES)
def test_training_has_same_bits_at_every_layout(name):
    options, layouts = CASES[name]
    assert_same_order_free({**BATCH, **options}, layouts)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("shape", ({"tied": True}, {"shape": "gpt2", "dtype": "fp32", "tied": True}), ids=str)
def test_training_has_same_bits_at_every_combination_of_sizes(shape):
    layouts = ({**layout, "sp": sp} for layout in EVERY for sp in {False, layout["tp"] > 1})
    assert_same_order_free({**BATCH, **shape, "model": FOUR, "steps": 2}, layouts)


def test_gather_and_other_sizes_of_tp_have_same_bits_at_every_layout():
    options = {**BATCH, "steps": 2, "vocab": 204, "seq": 18, "model": {"num_attention_heads": 6, "num_query_groups": 6}}
    records = [
        on_ranks(ranks, train_under_gather, {"tp": 1, **options, **layout})[0]
        for ranks, layout in ((1, {}), (6, {"tp": 3, "sp": True, "micro_batch": 3}))
    ]
    assert not differences(*records)


def train_under_gather(options: dict[str, Any]) -> dict[str, Any]:
    patches.enable("gather", batch="order-free")
    return plain_megatron.train(**options)


def test_wgrad_fusion_changes_no_bit():
    options = {**BATCH, "steps": 2}
    one, fused = (run("order-free", 1, **options, model={"gradient_accumulation_fusion": on}) for on in (False, True))
    assert not differences(one, fused)


# The tree is the same at every TP, and refuses tied embeddings in a pipeline.
@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        *itertools.product(("stock", "tree"), ({"dp": 2}, {"dp": 3}, {"micro_batch": 2})),
        *itertools.product(("stock",), ({"pp": 2, "tied": True}, {"tp": 2})),
    ],
    ids=str,
)
def test_without_it_each_axis_changes_bits(strategy, layout):
    options = {**BATCH, "steps": 2, "model": {"num_layers": 2}, "tied": "tied" in layout}
    one = run(strategy, 1, **options)
    assert any(name.startswith("final/") for name in unlike(one, strategy, options, layout))


@pytest.mark.parametrize("shape", ({}, {"shape": "gpt2", "tied": True}), ids=str)
def test_gradients_are_those_of_sums_in_order_but_for_rounding(shape):
    options = {**BATCH, "steps": 1, "dtype": "fp32", "model": {"num_layers": 2}, "digested": False, **shape}
    ordered, free = (run(strategy, 1, **options)["step0 gradients"] for strategy in ("tree", "order-free"))
    assert ordered.keys() == free.keys()
    for name, gradient in ordered.items():
        # Twelve additions in float32, of numbers that may cancel, against none.
        close = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(free[name], gradient, rtol=1e-4, atol=close, msg=lambda text, name=name: name + text)

"""megatron-core's GPTModel of Transformer Engine layers under `patches.enable()`: losses, gradients, gradient norms
and float32 main parameters have the same bits at every TP size, the very bits of Megatron's local layers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.megatron_runs import FULL_RECOMPUTE, PIPELINES, differences, matrices, of_the_run, run

CASES: dict[str, dict[str, Any]] = {
    "qwen3": {"steps": 5},
    "gpt-2 shape fp32": {"shape": "gpt2", "dtype": "fp32", "steps": 5},
    "four KV groups fp32": {"model": {"num_query_groups": 4}, "dtype": "fp32"},
    "full recompute": {"model": FULL_RECOMPUTE},
    "gradient accumulation fusion": {"model": {"gradient_accumulation_fusion": True}},
    "initialised on the device": {"model": {"use_cpu_initialization": False}},
    "zero-centered gamma": {"model": {"layernorm_zero_centered_gamma": True}},
    "distributed optimizer": {"ddp": {"use_distributed_optimizer": True}},
}
FIVE_STEPS = [name for name in CASES if "steps" in CASES[name]]
EVERY_SIZE = ((2, False), (2, True), (4, False), (4, True), (8, False), (8, True))


@pytest.mark.parametrize("name", CASES)
def test_training_has_same_bits_at_every_tp(name):
    one = run("tree", 1, te=True, **CASES[name])
    for tp, sp in EVERY_SIZE if name in FIVE_STEPS else ((2, False), (4, True)):
        assert not differences(one, run("tree", tp, sp, te=True, **CASES[name])), f"tp={tp} sp={sp}"


def test_training_has_same_bits_at_every_pp():
    _, options = PIPELINES["qwen3"]
    one = run("tree", 1, te=True, **options)
    for tp, layout in ((1, {"pp": 2, "vpp": 2}), (2, {"sp": True, "pp": 2})):
        assert not differences(one, run("tree", tp, te=True, **layout, **options)), f"tp={tp} {layout}"


ORDER_FREE: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "qwen3, tied": (
        {"tied": True},
        [{"tp": 2, "sp": True, "micro_batch": 4}, {"pp": 2, "dp": 3, "ddp": {"overlap_grad_reduce": True}}],
    ),
    "gpt-2 shape fp32": (
        {"shape": "gpt2", "dtype": "fp32"},
        [{"tp": 2, "micro_batch": 3}, {"pp": 2, "micro_batch": 2}],
    ),
    "zero-centered gamma": (
        {"model": {"layernorm_zero_centered_gamma": True, "gradient_accumulation_fusion": True}},
        [{"dp": 2, "micro_batch": 2}],
    ),
    "chunks, tied, two KV groups": (
        {"tied": True, "seq": 32, "chunks": 8, "model": {"num_query_groups": 2}},
        [{"cp": 4}, {"cp": 2, "tp": 4, "sp": True}, {"cp": 2, "pp": 2, "micro_batch": 2}],
    ),
    "chunks, gpt-2 shape fp32": (
        {"shape": "gpt2", "dtype": "fp32", "seq": 32, "chunks": 4, "model": {"cp_comm_type": "all_gather"}},
        [{"cp": 2, "tp": 2, "sp": True, "micro_batch": 3}],
    ),
}


@pytest.mark.parametrize("name", ORDER_FREE)
def test_training_has_same_bits_at_every_layout_where_the_batch_has_no_order(name):
    options, layouts = ORDER_FREE[name]
    options = {"seq": 16, "global_batch": 12, "micro_batch": 1, "te": True, **options}
    options["model"] = {"num_layers": 2, **options.get("model", {})}
    one = run("order-free", 1, **options)
    for layout in layouts:
        assert not differences(one, run("order-free", **{"tp": 1, **options, **layout})), layout
    if name != "zero-centered gamma":
        assert not differences(of_the_run(one), of_the_run(run("order-free", 1, **{**options, "te": False})))


@pytest.mark.parametrize("name", FIVE_STEPS)
def test_training_under_gather_has_same_bits_at_every_tp(name):
    one = run("gather", 1, te=True, **CASES[name])
    for tp, sp in EVERY_SIZE:
        assert not differences(one, run("gather", tp, sp, te=True, **CASES[name])), f"tp={tp} sp={sp}"


@pytest.mark.parametrize(
    ("strategy", "name"), [("gather", "qwen3"), *(("tree", name) for name in CASES if name != "zero-centered gamma")]
)
def test_training_has_the_bits_of_the_local_layers(strategy, name):
    """All of them; but the local layers have no zero-centered gamma."""
    options = {**CASES[name], "steps": 2}
    local, te_layers = (run(strategy, 2, True, te=te, **options) for te in (False, True))
    assert not differences(of_the_run(local), of_the_run(te_layers))
    assert matrices(local) <= matrices(te_layers) and matrices(local)


@pytest.mark.parametrize("name", FIVE_STEPS)
def test_stock_training_has_other_bits_at_every_tp(name):
    one = run("stock", 1, te=True, **CASES[name])
    for tp in (2, 4):
        assert any(key.startswith("final/") for key in differences(one, run("stock", tp, te=True, **CASES[name])))

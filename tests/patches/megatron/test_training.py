"""Stock megatron-core under `patches.enable()`: losses, gradients, gradient norms and float32 main parameters have
the same bits at every TP size, and without the patches they do not."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from packaging.version import Version

import patches
from tests.support import plain_megatron
from tests.support.megatron_runs import FULL_RECOMPUTE, PIPELINES, differences, run
from tests.support.ranks import on_ranks

FUSIONS = {"bias_activation_fusion": True, "bias_dropout_fusion": True, "cross_entropy_loss_fusion": True}

CASES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3 fp32": {"dtype": "fp32"},
    "two layers, three microbatches": {"model": {"num_layers": 2}, "microbatches": 3},
    "gpt-2 shape": {"shape": "gpt2"},
    "gpt-2 shape fp32": {"shape": "gpt2", "dtype": "fp32"},
    "tied embeddings": {"tied": True},
    "gpt-2 shape, tied": {"shape": "gpt2", "tied": True, "model": {"num_query_groups": 4}},
    "four KV groups": {"model": {"num_query_groups": 4}},
    "one KV group fp32": {"model": {"num_query_groups": 1}, "dtype": "fp32"},
    "two KV groups, sixteen heads": {"model": {"num_query_groups": 2, "num_attention_heads": 16}},
    "full recompute": {"model": FULL_RECOMPUTE},
    "selective recompute": {"model": {"recompute_granularity": "selective"}},
    "gradient accumulation fusion": {"model": {"gradient_accumulation_fusion": True}},
    "other fusions": {"model": FUSIONS},
    "other fusions, gpt-2 shape": {"model": FUSIONS, "shape": "gpt2"},
    "initialised on the device": {"model": {"use_cpu_initialization": False}},
    "distributed optimizer": {"ddp": {"use_distributed_optimizer": True}},
    "bf16 gradients": {"ddp": {"grad_reduce_in_fp32": False}},
    "no clipping": {"clip": 0.0},
    "feed-forward of an odd size per leaf fp32": {"model": {"ffn_hidden_size": 360}, "dtype": "fp32"},
}
WIDE = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "kv_channels": 64,
    "ffn_hidden_size": 1000,
}
DATA_PARALLEL: dict[str, dict[str, Any]] = {
    "3 ranks": {"dp": 3},
    "3 ranks fp32, distributed optimizer": {"dp": 3, "dtype": "fp32", "ddp": {"use_distributed_optimizer": True}},
    "4 ranks fp32": {"dp": 4, "dtype": "fp32"},
    "4 ranks, everything overlapped": {"dp": 4, "ddp": {
        "use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}},
    "3 ranks, averaged in the collective": {"dp": 3, "ddp": {"average_in_collective": True}},
}  # fmt: skip


SHARED_GROUPS = Version(version("megatron-core")) >= Version(
    "0.16"
)  # before, Megatron refuses fewer KV groups than ranks


def sizes(options: dict[str, Any], *candidates: tuple[int, bool]) -> list[tuple[int, bool]]:
    """The (tp, sp) of `candidates` that this Megatron can split the model into."""
    groups = options.get("model", {}).get("num_query_groups", 8)
    return [(tp, sp) for tp, sp in candidates if SHARED_GROUPS or tp <= groups]


@pytest.mark.parametrize("name", CASES)
def test_training_under_tree_has_same_bits_at_every_tp(name):
    one = run("tree", 1, **CASES[name])
    every = ((2, False), (2, True), (4, False), (4, True), (8, False), (8, True))
    for tp, sp in sizes(CASES[name], *(every if name in ("qwen3", "gpt-2 shape fp32") else ((4, True), (8, False)))):
        assert not differences(one, run("tree", tp, sp, **CASES[name])), f"tp={tp} sp={sp}"


@pytest.mark.parametrize("name", ("qwen3 fp32", "gpt-2 shape", "four KV groups", "distributed optimizer"))
def test_training_under_gather_has_same_bits_at_every_tp(name):
    one = run("gather", 1, **CASES[name])
    for tp, sp in sizes(CASES[name], (2, False), (8, True)):
        assert not differences(one, run("gather", tp, sp, **CASES[name])), f"tp={tp} sp={sp}"


@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_data_parallel_training_has_same_bits_at_every_tp(name):
    one = run("tree", 1, **DATA_PARALLEL[name])
    assert not differences(one, run("tree", 2, True, **DATA_PARALLEL[name]))


@pytest.mark.parametrize("name", PIPELINES)
def test_training_under_tree_has_same_bits_at_every_pp(name):
    layouts, options = PIPELINES[name]
    one = run("tree", 1, **options)
    assert any(".layers.3." in parameter for parameter in one["final"])
    for layout in layouts:
        assert not differences(one, run("tree", **layout, **options)), layout


def test_training_under_gather_has_same_bits_at_every_pp():
    layouts, options = PIPELINES["gpt-2 shape fp32"]
    one = run("gather", 1, **options)
    for layout in layouts:
        assert not differences(one, run("gather", **layout, **options)), layout


@pytest.mark.parametrize("dtype", ("bf16", pytest.param("fp32", marks=pytest.mark.slow)))
def test_wide_layers_have_same_bits_at_every_tp_and_thread_count(dtype):
    """Hidden sizes from 1024 up are where libraries begin to pick kernels by shape."""
    options = {"model": WIDE, "dtype": dtype, "seq": 40, "micro_batch": 1, "vocab": 1016}
    one = run("tree", 1, **options)
    assert not differences(one, run("tree", 4, True, **options))
    # A rank forked from a process whose OpenMP threads have run would wait for them for ever.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        assert not differences(one, fresh.submit(run, "tree", 1, threads=2, **options).result())


def test_odd_sequence_and_vocabulary_have_same_bits_at_every_tp():
    options = {"seq": 19, "vocab": 204, "dtype": "fp32"}
    one = run("tree", 1, **options)
    for tp in (2, 4):
        assert not differences(one, run("tree", tp, **options))


def test_tp_3_has_same_bits_under_gather_and_is_refused_under_tree():
    options = {"model": {"num_attention_heads": 6, "num_query_groups": 6}, "vocab": 204, "seq": 18}
    assert not differences(run("gather", 1, **options), run("gather", 3, True, **options))
    with pytest.raises(AssertionError, match="tp=3"):
        run("tree", 3, **options)


def train_in_a_process_that_others_have_set_up(tp: int) -> dict[str, Any]:
    patches.enable()
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.enabled = False
    torch.set_flush_denormal(True)
    torch.rand(17 // tp)
    return plain_megatron.train(tp=tp)


def test_bits_follow_nothing_that_others_may_have_set_or_drawn_in_the_process():
    one = run("tree", 1)
    assert not differences(one, on_ranks(2, train_in_a_process_that_others_have_set_up, 2)[0])


def test_negative_zeros_in_the_embedding_do_not_tell_tp_sizes_apart():
    """-0.0 + 0.0 is +0.0, so a sum over ranks loses signs that TP=1 keeps."""
    options = {"dtype": "fp32", "negative_zeros": True}
    one = run("tree", 1, **options)
    for tp, sp in ((2, False), (8, True)):
        assert not differences(one, run("tree", tp, sp, **options))


@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_stock_training_has_other_bits_at_every_tp(dtype):
    one = run("stock", 1, dtype=dtype)
    for tp in (2, 4, 8):
        assert any(name.startswith("final/") for name in differences(one, run("stock", tp, dtype=dtype)))

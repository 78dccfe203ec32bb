"""Whole layers on the kernels, on gloo ranks in the interpreter: right, and the same bits at every TP size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")
if torch.cuda.is_available():
    pytest.skip("these ranks hold CPU tensors, which only the interpreter takes", allow_module_level=True)

import patches
from patches.aten.overrides import LocalInvariance
from patches.contract import Contract
from patches.ops.embedding import embedding
from patches.ops.sharded import Shards
from patches.order import backend, exact, kernels
from patches.order.collectives import all_gather
from patches.registry import REGISTRY
from tests.support.bits import assert_same_bits
from tests.support.gated_mlp import assert_right_and_same_bits, attention_keys
from tests.support.megatron_runs import differences, run
from tests.support.ranks import on_ranks


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """Kernels for all but products, which take the interpreter too long."""
    of_products = ["check", *(name for name in kernels.__all__ if "product" in name)]
    names = dict.fromkeys(kernels.__all__, kernels) | dict.fromkeys(of_products, exact)
    mixed = SimpleNamespace(**{name: getattr(package, name) for name, package in names.items()})
    monkeypatch.setitem(backend._BACKENDS, "cpu", lambda: mixed)


@pytest.mark.parametrize("centered", (False, True), ids=("rmsnorm", "layernorm"))
@pytest.mark.parametrize("strategy", ("tree", "gather"))
def test_layers_are_right_and_have_same_bits_at_every_tp(strategy, centered):
    assert_right_and_same_bits(
        strategy, torch.bfloat16 if centered else torch.float32, centered, ((2, True), (4, False))
    )


@pytest.mark.parametrize("strategy", ("tree", "gather"))
def test_shared_keys_get_same_gradient_at_every_tp(strategy):
    one = on_ranks(1, attention_keys, strategy, 2, 16)[0]
    assert all(torch.equal(one, other) for other in on_ranks(4, attention_keys, strategy, 2, 16))


MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model": {"num_query_groups": 2}},
    "transformer engine": {"model": {"num_query_groups": 2}, "te": True},
    "gpt-2": {"shape": "gpt2", "dtype": "fp32", "tied": True, "microbatches": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_megatron_trains_to_same_bits_at_every_tp(name):
    options = {"seq": 16, "micro_batch": 1, "steps": 1, **MODELS[name]}
    if options.get("te"):
        pytest.importorskip("transformer_engine", reason="Transformer Engine is not on the path: make test-kernels")
    one = run("tree", 1, **options)
    for tp, sp in ((2, True), (4, True)):
        assert not differences(one, run("tree", tp, sp, **options)), f"tp={tp} sp={sp}"


def test_attention_is_the_kernels_where_none_is_named():
    with patches.enabled():
        assert REGISTRY.contract.attention == "blockwise"


def test_megatron_trains_to_same_bits_at_every_layout_where_the_batch_has_no_order():
    options = {"seq": 16, "global_batch": 6, "micro_batch": 1, "shape": "gpt2", "tied": True}
    one = run("order-free", 1, **options)
    for layout in ({"tp": 2, "sp": True, "micro_batch": 3}, {"tp": 1, "dp": 3, "micro_batch": 2}):
        assert not differences(one, run("order-free", **options | layout)), layout


def embedded(strategy: Any) -> tuple[torch.Tensor, torch.Tensor]:
    group = dist.group.WORLD
    g = torch.Generator().manual_seed(0)
    weight, ids = torch.randn(24, 10, generator=g), torch.randint(0, 24, (3, 30), generator=g)
    weight[5] = -0.0
    share = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    y = embedding(share, ids, Shards(Contract(strategy), group))
    y.backward(torch.randn(3, 30, 10, generator=g))
    total = y.detach().clone()
    dist.all_reduce(total, group=group)
    return total, all_gather(share.grad, group)


def test_embedding_and_its_gradient_are_the_same_at_every_tp():
    one = on_ranks(1, embedded, "tree")[0]
    for tp in (2, 3):
        for other in on_ranks(tp, embedded, "gather" if tp == 3 else "tree"):
            for x, y in zip(one, other, strict=True):
                assert_same_bits(x, y)


def test_atens_reductions_take_the_kernels():
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    local = LocalInvariance("CPU")
    try:
        got = [
            x.sum(),
            x.sum(1),
            x.mean(0, keepdim=True),
            x.softmax(1),
            x.log_softmax(0),
            x.sum((0, 1), dtype=torch.bfloat16),
        ]
        leaf = x.clone().requires_grad_()
        leaf.softmax(1).log_softmax(0).square().sum().backward()
    finally:
        local.remove()
    X = x.double().requires_grad_()
    X.softmax(1).log_softmax(0).square().sum().backward()
    want = [x.double().sum(), x.double().sum(1), x.double().mean(0, keepdim=True), x.double().softmax(1),
            x.double().log_softmax(0), x.double().sum().bfloat16()]  # fmt: skip
    for a, b in zip([*got, leaf.grad], [*want, X.grad], strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-5)
    assert got[-1].dtype == torch.bfloat16

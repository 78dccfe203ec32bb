"""Mixtures of experts of Transformer Engine's layers, TE's grouped ones among them, under
`patches.enable(batch="order-free")`: one set of bits at every layout, the very bits of Megatron's `SequentialMLP`."""

from __future__ import annotations

from typing import Any

import pytest

import patches
from patches.megatron import initial_weights
from patches.te import grouped_linear, megatron_extensions
from tests.support import plain_megatron
from tests.support.megatron_runs import differences, matrices, of_the_run, run, training_without
from tests.support.mixtures import SHARDED, comparable, layout, options_of
from tests.support.ranks import on_ranks

SOME: dict[str, list[dict[str, Any]]] = {
    "softmax, top 2, balanced": [layout(2, 2, 2, micro_batch=2), layout(4, 8, 1)],
    "sigmoid, top 8, allgather": [layout(2, 1, 1, ddp=SHARDED)],
    "shared expert, full recompute fp32": [layout(1, 2, 2)],
    "two layers, fusions": [layout(1, 4, 1)],
    "equal scores, idle experts": [layout(2, 4, 2)],
}
PLAIN = "softmax, top 2, balanced"


def options(name: str, grouped: bool = True, **more: Any) -> dict[str, Any]:
    ours = options_of(name)
    return {**ours, "te": True, **more, "model": {**ours["model"], "moe_grouped_gemm": grouped}}


@pytest.mark.parametrize("name", SOME)
def test_training_has_the_bits_of_sequential_experts_at_every_layout(name):
    one = run("order-free", 1, **options(name))
    assert float.fromhex(one["step1 gradient norm"]) and len(one["step1 gradients"]) > 20
    sequential = run("order-free", 1, **options_of(name))
    assert not differences(of_the_run(one), of_the_run(sequential))
    assert matrices(sequential) <= matrices(one) and matrices(sequential)
    for where in SOME[name]:
        other = run("order-free", **options(name, **where))
        assert not differences(*((comparable(x) for x in (one, other)) if "ddp" in where else (one, other))), where


def test_sequential_experts_of_te_layers_have_the_same_bits():
    one = run("order-free", 1, **options(PLAIN))
    for where in (layout(1, 1, 1), layout(2, 1, 2), layout(2, 4, 1)):
        assert not differences(one, run("order-free", **options(PLAIN, grouped=False, **where))), where


def stock(where: dict[str, Any]) -> dict[str, Any]:
    """Stock's run, but from weights that are drawn by name."""
    patches.cpu.enable()
    for patch in (*initial_weights.PATCHES, *megatron_extensions.PATCHES):
        patch.install(patches.Contract())
    return plain_megatron.train(**{name: value for name, value in options(PLAIN, **where).items() if name != "dp"})


def stock_on_ranks(where: dict[str, Any]) -> dict[str, Any]:
    return on_ranks(where["tp"] * where["dp"], stock, where)[0]


@pytest.mark.parametrize("where", (layout(2, 1, 2), layout(1, 2, 1), layout(1, 1, 1, micro_batch=2)), ids=str)
def test_stock_depends_on_every_axis(where):
    one, other = (stock_on_ranks(each) for each in (layout(1, 1, 1), where))
    assert one["initial"] == other["initial"]
    assert any(name.startswith("final/") for name in differences(one, other))


# name: what the run ends with when it is left out, or a layout at which it has other bits
NEEDED: dict[str, str | dict[str, Any]] = {
    "te-grouped-linear": "is summed by a module",
    "grouped-expert-weights": layout(1, 1, 2),
    "te-init-grouped-row": layout(1, 1, 2),
    "te-init-grouped-column": layout(1, 1, 2),
}


def without(names: set[str], where: dict[str, Any]) -> dict[str, Any]:
    given = {**options(PLAIN), **where}
    return on_ranks(given["tp"] * given.pop("dp"), training_without, names, given, "order-free", True)[0]


@pytest.mark.parametrize("name", NEEDED)
def test_each_patch_is_needed(name):
    needed = NEEDED[name]
    if isinstance(needed, str):
        with pytest.raises(AssertionError, match=needed):
            without({name}, layout(1, 1, 1))
        return
    assert differences(*(without({name}, each) for each in (layout(1, 1, 1), needed)))


def test_every_patch_of_grouped_experts_is_ablated():
    ours = {patch.name for patch in (*grouped_linear.PATCHES, *megatron_extensions.PATCHES) if "grouped" in patch.name}
    assert NEEDED.keys() == ours | {"grouped-expert-weights"}

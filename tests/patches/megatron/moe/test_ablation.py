"""Each patch of mixtures of experts is needed: with any one left out, a layout changes bits, or the run is refused."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

import patches
from patches.megatron import moe
from tests.support.megatron_runs import differences, training_without
from tests.support.mixtures import CAPACITY, SHARDED, layout, options_of
from tests.support.ranks import on_ranks

# name: (a layout that feels it, model settings)
FEELS_IT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "router-choice": (layout(1, 1, 1, micro_batch=2), CAPACITY),
    "expert-weights": (layout(1, 1, 2), {}),
    "experts": (layout(2, 1, 1), {}),
}
REFUSED_WITHOUT = {
    "router-product": "router.weight, or a part of it, is summed by a module",
    "shared-expert-gate": "gate_weight, or a part of it, is summed by a module",
    "mixture": "no attribute '_patches_grouped'",
}


def without(names: set[str], model: dict[str, Any], where: dict[str, Any], **more: Any) -> dict[str, Any]:
    options = options_of("shared expert")
    options = {**options, **where, **more, "model": {**options["model"], **model}}
    return on_ranks(options["tp"] * options.pop("dp"), training_without, names, options, "order-free")[0]


@pytest.mark.parametrize("name", FEELS_IT)
def test_bits_depend_on_the_layout_without(name):
    where, model = FEELS_IT[name]
    assert differences(*(without({name}, model, each) for each in (layout(1, 1, 1), where)))
    assert not differences(*(without(set(), model, each) for each in (layout(1, 1, 1), where)))


@pytest.mark.parametrize("name", REFUSED_WITHOUT)
def test_run_is_refused_without(name):
    with pytest.raises(AssertionError, match=REFUSED_WITHOUT[name]):
        without({name}, {}, layout(1, 1, 1))


def test_two_norms_are_rounded_in_another_order_without():
    def norms(names: set[str], **where: Any) -> list[str]:
        record = without(names, {}, layout(1, 1, 1), steps=8, **where)
        return [value for name, value in record.items() if "norm" in name]

    name = {"gradient-norm-of-experts"}
    assert norms(name) != norms(name, ddp=SHARDED)
    assert norms(set()) == norms(set(), ddp=SHARDED)


def updated_bias(patched: bool) -> list[float]:
    """Of two experts of which one rank had 2^24 - 1 tokens each, and the other 2 and 1."""
    if patched:
        patches.enable(batch="order-free")
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")  # a function hides it
    parallel_state.initialize_model_parallel(1)
    counts = torch.tensor([[16777215.0, 16777215.0], [2.0, 1.0]])[dist.get_rank()]
    return finalize.get_updated_expert_bias(counts, torch.zeros(2), 1.0).tolist()


def test_tokens_are_miscounted_without_expert_bias():
    assert on_ranks(2, updated_bias, False)[0] == [0.0, 0.0]
    assert on_ranks(2, updated_bias, True)[0] == [-1.0, 1.0]


def test_every_patch_is_ablated():
    elsewhere = {"expert-bias", "grouped-expert-weights"}  # above; tests.patches.te.test_mixture
    assert {patch.name for patch in moe.PATCHES} == FEELS_IT.keys() | REFUSED_WITHOUT.keys() | elsewhere

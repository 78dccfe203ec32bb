"""Sums across ranks that are under way while something else is computed, and ranks that read each other's memory."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import patches
from patches.contract import Contract, UnsupportedError
from patches.ops import linear
from patches.ops.linear import GradSink, column_parallel
from patches.ops.sharded import Shards
from patches.order import collectives
from patches.order.collectives import begin_all_gather, begin_all_reduce, begin_reduce_scatter, tree_all_reduce
from tests.support.ranks import on_ranks


def contribution(rank: int) -> Tensor:
    return torch.randn(4, 1001, generator=torch.Generator().manual_seed(rank))


def many_at_once() -> list[Tensor]:
    """Sums that are all begun before the first is asked for; what was sent is forgotten and memory is filled anew."""
    group, root = dist.group.WORLD, contribution(dist.get_rank())
    pending = [begin_all_reduce(root * n, group, torch.bfloat16) for n in range(1, 20)]
    pending += [begin_reduce_scatter(root * n, group, torch.float32) for n in range(1, 20)]
    pending += [begin_all_gather(root * n, group) for n in range(1, 20)]
    del root
    gc.collect()
    rubbish = [torch.full((4, 1001), float("nan")) for _ in range(60)]
    del rubbish
    return [result.wait() for result in pending]


@pytest.mark.parametrize("small", (1 << 18, 0))
def test_sums_under_way_keep_what_they_send(small, monkeypatch):
    monkeypatch.setattr(collectives, "SMALL", small)
    x = [contribution(rank) for rank in range(4)]
    for rank, found in enumerate(on_ranks(4, many_at_once)):
        for n in range(1, 20):
            root = (x[0] * n + x[1] * n) + (x[2] * n + x[3] * n)
            assert torch.equal(found[n - 1], root.bfloat16())
            assert torch.equal(found[n + 18], root[rank : rank + 1])
            assert torch.equal(found[n + 37], torch.cat(x) * n)


def begun_before_the_other(folder: Path) -> bool:
    """Rank 1 begins only when rank 0 has begun and gone on."""
    group, began = dist.group.WORLD, folder / "began"
    if dist.get_rank() == 1:
        while not began.exists():
            time.sleep(0.01)
    result = begin_all_reduce(torch.ones(8), group, torch.float32)
    began.touch()
    return bool(result.wait().eq(2).all())


def test_a_sum_is_begun_without_waiting_for_other_ranks(tmp_path):
    assert on_ranks(2, begun_before_the_other, tmp_path, timeout=60) == [True, True]


def events_of_a_backward(strategy: Any, sp: bool) -> list[str]:
    events: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return function(*args, **kwargs)

        return call

    x = torch.ones(4 if sp else 8, 1, 16, requires_grad=True)
    weight = torch.ones(8, 16, requires_grad=True)
    y = column_parallel(x, weight, None, Shards(Contract(strategy), dist.group.WORLD), sp, GradSink())
    dist.all_to_all_single = noted("roots sent", dist.all_to_all_single)
    dist.all_gather_into_tensor = noted("gather", dist.all_gather_into_tensor)
    linear._weight_gradient = noted("wgrad", linear._weight_gradient)
    dist.Work.wait = noted("wait", dist.Work.wait)
    y.sum().backward()
    return events


@pytest.mark.parametrize(("sp", "small", "expected"), [
    (True, 1 << 18, "gather, roots sent, wait, wgrad, wait"),
    (False, 1 << 18, "gather, wgrad, wait"),
    (False, 0, "roots sent, wgrad, wait, gather, wait"),
])  # fmt: skip
def test_dgrad_travels_while_wgrad_is_computed(sp, small, expected, monkeypatch):
    monkeypatch.setattr(collectives, "SMALL", small)
    assert ", ".join(on_ranks(2, events_of_a_backward, "tree", sp)[0]) == expected


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_small_roots_and_large_ones_have_the_same_sum(dtype, monkeypatch):
    def total() -> Tensor:
        return tree_all_reduce(contribution(dist.get_rank()), dist.group.WORLD, dtype, divide_by=3)

    small = on_ranks(4, total)
    monkeypatch.setattr(collectives, "SMALL", 0)
    large = on_ranks(4, total)
    assert all(torch.equal(x, small[0]) for x in [*small, *large])


def test_symmetric_memory_is_refused_where_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UnsupportedError, match="symmetric_memory=True needs GPUs, not a cpu: leave symmetric_memory="):
        patches.enable(symmetric_memory=True)
    assert all(not row.applied for row in patches.status())


def symmetric_product() -> str:
    shards = Shards(Contract(symmetric_memory=True), dist.group.WORLD)
    try:
        shards.product(torch.ones(2, 8), torch.ones(8, 2), torch.float32)
    except UnsupportedError as error:
        return str(error)
    return "not refused"


def test_symmetric_memory_never_falls_back_to_sending():
    assert all("needs GPUs" in message for message in on_ranks(2, symmetric_product))

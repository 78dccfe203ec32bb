"""A gated MLP with norm, output layer and cross-entropy, made of `patches.ops`: right against float64, and with the
same bits at every TP size, with sequence parallelism (SP) and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from patches.contract import Contract, UnsupportedError
from patches.ops import linear, sharded
from patches.ops.sharded import Shards
from patches.order.collectives import tree_all_reduce
from patches.order.grad_norm import gradient_norm
from tests.support.gated_mlp import assert_right_and_same_bits, attention_keys
from tests.support.ranks import on_ranks

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("centered", (False, True), ids=("rmsnorm", "layernorm"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ("tree", "gather"))
def test_layers_are_right_and_have_same_bits_at_every_tp(strategy, dtype, centered):
    assert_right_and_same_bits(strategy, dtype, centered, ((2, True), (4, False), (8, True)))


def test_gather_takes_tp_sizes_that_the_tree_cannot():
    one = on_ranks(1, small_product, "gather")[0]
    for tp in (3, 6):
        assert torch.equal(one, on_ranks(tp, small_product, "gather")[0])
    message = 'tp=3 does not divide leaves=8: use a power of two up to 8, or strategy="gather"'
    with pytest.raises(UnsupportedError, match=message):
        Contract("tree", 8).check_tp(3)


def small_product(strategy: Any) -> Tensor:
    group = dist.group.WORLD
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 36, generator=g), torch.randn(36, 5, generator=g)
    share = [part.chunk(group.size(), dim)[group.rank()] for part, dim in ((a, 1), (b, 0))]
    return Shards(Contract(strategy), group).product(*share, torch.float32)


@pytest.mark.parametrize("strategy", ("tree", "gather"))
@pytest.mark.parametrize(("groups", "heads"), ((8, 16), (4, 8), (2, 16)))
def test_shared_keys_get_same_gradient_at_every_tp(strategy, groups, heads):
    one = on_ranks(1, attention_keys, strategy, groups, heads)[0]
    for tp in (4, 8):
        assert all(torch.equal(one, other) for other in on_ranks(tp, attention_keys, strategy, groups, heads))


def reduced(dtype: torch.dtype) -> tuple[Tensor, float]:
    group = dist.group.WORLD
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(group.rank()))
    return tree_all_reduce(x, group, dtype), gradient_norm([x], [group], torch.device("cpu"))


@pytest.mark.parametrize("size", (2, 3, 4))
def test_all_reduce_adds_by_pairs_in_rank_order(size):
    x = [torch.randn(3, 7, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]
    want = {2: lambda: x[0] + x[1], 3: lambda: (x[0] + x[1]) + x[2], 4: lambda: (x[0] + x[1]) + (x[2] + x[3])}[size]()
    for got, norm_ in on_ranks(size, reduced, torch.bfloat16):
        assert torch.equal(got, want.bfloat16())
        assert norm_ == pytest.approx(torch.stack(x).double().norm().item(), rel=2**-40)


def beside_collectives(sp: bool) -> list[bool]:
    """Of the products of a column-parallel layer's forward, dgrad and wgrad: which were told of a collective."""
    told = []

    def recorded(original: Any) -> Any:
        def call(*args: Any, beside_collective: bool = False, **kwargs: Any) -> Tensor:
            told.append(beside_collective)
            return original(*args, **kwargs)

        return call

    linear.product, sharded.product = recorded(linear.product), recorded(sharded.product)
    group = dist.group.WORLD
    x = torch.randn(8 // group.size() if sp else 8, 1, 16, requires_grad=True)
    weight = torch.randn(32 // group.size(), 16, requires_grad=True)
    shards = Shards(Contract(), group)
    linear.column_parallel(x, weight, None, shards, sp, linear.GradSink(False)).sum().backward()
    return told


@pytest.mark.parametrize(("size", "sp", "told"), ((1, False, [0, 0, 0]), (2, False, [0, 0, 1]), (2, True, [0, 1, 1])))
def test_products_leave_processors_to_a_collective_that_is_under_way(size, sp, told):
    assert on_ranks(size, beside_collectives, sp)[0] == [bool(each) for each in told]

"""Chunks of a sequence on context-parallel ranks: Megatron's deal, and one tree at every size."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patches.contract import Contract, UnsupportedError
from patches.order import exact
from patches.order.chunks import begin_gather, begin_sum_of_own, chunks_of_rank, own_tokens, tree_order
from patches.order.tree import tree_sum
from patches.order.visible import Visible
from tests.support.attention_bounds import assert_chunks_have_their_bits, operands
from tests.support.bits import assert_same_bits
from tests.support.ranks import on_ranks

powers = st.integers(0, 5).map(lambda n: 2**n)


def layouts() -> st.SearchStrategy[tuple[int, int]]:
    """(chunks, ranks) that go together."""
    return powers.flatmap(lambda size: powers.map(lambda more: (2 * size * more, size)))


@given(layouts())
def test_ranks_have_the_chunks_that_megatron_deals_them(layout):
    chunks, size = layout
    each = chunks // (2 * size)
    dealt = torch.arange(chunks).view(2 * size, each)
    for rank in range(size):
        assert chunks_of_rank(chunks, rank, size) == dealt[[rank, 2 * size - rank - 1]].flatten().tolist()


@given(layouts(), st.data())
@settings(deadline=None)
def test_a_ranks_chunks_are_a_subtree_at_every_size(layout, data):
    """Of sums that round: any other order than the tree's would be seen in some of these."""
    chunks, size = layout
    values = data.draw(st.lists(st.floats(-1e6, 1e6, width=32), min_size=chunks, max_size=chunks))
    leaf = torch.tensor(values, dtype=torch.float32)
    whole = tree_sum(leaf[number] for number in tree_order(chunks))
    roots = []
    for rank in range(size):
        own = leaf[chunks_of_rank(chunks, rank, size)]
        roots.append(tree_sum(own[i] for i in tree_order(len(own))))
    assert_same_bits(tree_sum(roots), whole)


@given(powers)
def test_every_chunk_is_a_leaf_once(chunks):
    assert sorted(tree_order(chunks)) == list(range(chunks))


def gathered_and_summed(x: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
    group = dist.group.WORLD
    own = own_tokens(x, group)
    return begin_gather(own, group).wait(), begin_sum_of_own(roots[group.rank()], group, torch.bfloat16).wait()


@pytest.mark.parametrize("size", (2, 4))
def test_tokens_are_gathered_in_their_order_and_each_rank_has_its_own_of_the_sum(size):
    x, roots = torch.randn(16, 3), torch.randn(size, 16, 2)
    total = tree_sum(roots).bfloat16()
    for rank, (whole, own) in enumerate(on_ranks(size, gathered_and_summed, x, roots)):
        assert_same_bits(whole, x)
        assert_same_bits(own, total.unflatten(0, (2 * size, -1))[[rank, 2 * size - rank - 1]].flatten(0, 1))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("visible", (Visible(right=0), Visible(left=30, right=0), Visible()), ids=str)
def test_a_chunk_of_the_queries_has_the_bits_that_it_has_among_all(visible, dtype):
    assert_chunks_have_their_bits(exact, operands(160, 160, 1, 2, 1, 16, dtype), visible, (4, 8), exactly=True)


@pytest.mark.parametrize(
    ("given_", "message"),
    (
        ({"chunks": 6}, "chunks=6 is not a power of two: use 1, 4, 8"),
        ({"chunks": 0}, "chunks=0 is not a power of two"),
        ({"chunks": 4, "batch": "ordered"}, "chunks=4 cuts sequences of sums without an order: use batch='order-free'"),
        ({"chunks": 4, "attention": "unfused"}, "chunks=4 takes attention='blockwise'.*not 'unfused'"),
    ),
)
def test_chunks_that_cannot_be_are_refused(given_, message):
    with pytest.raises(ValueError, match=message):
        Contract(**{"batch": "order-free", "attention": "blockwise", **given_})


@pytest.mark.parametrize(
    ("contract", "cp", "message"),
    (
        (Contract(), 2, "context_parallel_size=2 is not covered by batch='ordered': use .*chunks=4.*set it to 1"),
        (Contract(batch="order-free"), 2, "context_parallel_size=2 needs chunks to be a multiple of 4, it is 1"),
        (Contract(batch="order-free", attention="blockwise", chunks=4), 4, "multiple of 8, it is 4"),
        (Contract(batch="order-free", attention="blockwise", chunks=8), 3, "multiple of 6, it is 8"),
    ),
)
def test_ranks_that_have_no_whole_chunks_are_refused(contract, cp, message):
    with pytest.raises(UnsupportedError, match=message):
        contract.chunks_of_rank(cp)

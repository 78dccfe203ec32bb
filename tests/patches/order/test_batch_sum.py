"""Sums over the batch: one exact total for any grouping, order and number of ranks; what is not exact is seen."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patches.order import batch_sum
from patches.order.batch_sum import BatchSum, exceeds, round_into
from patches.order.grid import LIMIT, UNIT
from tests.support.bits import same_bits

SIZE = 3
# Numbers of any magnitude that float32 has, those that meet the grid's halves, and ones that are no numbers.
finite = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.builds(lambda units, power: math.ldexp(units, power - 31), st.integers(-(2**23), 2**23), st.integers(0, 30)),
)
anything = st.one_of(finite, st.just(math.inf), st.just(-math.inf), st.just(math.nan))
contributions = st.lists(st.lists(finite, min_size=SIZE, max_size=SIZE), max_size=12)


def summed(rows: list[list[float]]) -> BatchSum:
    found = BatchSum.of(torch.zeros(SIZE, dtype=torch.int64))
    for row in rows:
        found.add(torch.tensor(row, dtype=torch.float32))
    return found


def units(x: float) -> int:
    """`x` on the grid, ties to even: the definition."""
    return round(torch.tensor(x, dtype=torch.float32).double().item() / UNIT)


def together(parts: list[BatchSum]) -> tuple[Tensor, Tensor]:
    """What a collective makes of the ranks' sums."""
    return torch.stack([part.total for part in parts]).sum(0), torch.stack([part.bound for part in parts]).sum()


@given(rows=contributions, data=st.data())
@settings(max_examples=300, deadline=None)
def test_total_is_the_exact_sum_at_any_number_of_ranks_in_any_order_or_is_seen_not_to_be(rows, data):
    shuffled = data.draw(st.permutations(rows))
    owners = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    ranks = [summed([row for row, owner in zip(shuffled, owners, strict=True) if owner == rank]) for rank in range(4)]
    total, bound = together(ranks)
    if not exceeds(bound):
        assert total.tolist() == [sum(units(row[i]) for row in rows) for i in range(SIZE)]
        assert torch.equal(total, summed(rows).total)


@given(rows=st.lists(st.lists(anything, min_size=SIZE, max_size=SIZE), min_size=1, max_size=12))
@settings(max_examples=300, deadline=None)
def test_what_does_not_fit_is_always_seen(rows):
    found = summed(rows)
    whole = [sum(units(row[i]) for row in rows) for i in range(SIZE) if all(math.isfinite(row[i]) for row in rows)]
    fits = len(whole) == SIZE and all(abs(total) < 2**63 for total in whole)
    assert fits or exceeds(found.bound)


@given(rows=contributions, copies=st.just(2))
@settings(max_examples=100, deadline=None)
def test_two_copies_of_a_parameter_fit_where_each_does(rows, copies):
    found = summed(rows)
    if not exceeds(found.bound):
        assert (found.total * copies).tolist() == [copies * total for total in found.total.tolist()]


def test_range_is_used_up_to_its_limit():
    largest = torch.tensor(LIMIT).nextafter(torch.tensor(0.0)).item()
    assert not exceeds(summed([[largest, 0.0, -largest]]).bound)
    assert exceeds(summed([[LIMIT, 0.0, 0.0]]).bound)
    assert exceeds(summed([[LIMIT / 2, 0.0, 0.0], [-LIMIT / 2, 0.0, 0.0]]).bound)


@given(rows=contributions)
@settings(max_examples=200, deadline=None)
def test_result_is_off_by_half_a_unit_per_contribution_and_its_own_rounding(rows):
    found = summed(rows)
    if exceeds(found.bound):
        return
    out = torch.empty(SIZE)
    round_into(out, found.total)
    for i in range(SIZE):
        exact = math.fsum(torch.tensor([row[i] for row in rows]).double().tolist())
        assert abs(out[i].item() - exact) <= len(rows) * UNIT / 2 + abs(exact) * 2.0**-23


@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    cut=st.integers(0, 30),
)
@settings(max_examples=100, deadline=None)
def test_rows_are_contributions_of_their_own(ids, dtype, cut):
    x = torch.randn(len(ids), 2, generator=torch.Generator().manual_seed(len(ids))).to(dtype)
    index = torch.tensor(ids)
    whole, parts = (BatchSum.of(torch.zeros(5, 2, dtype=torch.int64)) for _ in range(2))
    whole.add_rows(index, x)
    for part in (slice(cut), slice(cut, None)):
        if len(ids[part]):
            parts.add_rows(index[part], x[part])
    want = [
        [sum(units(x[t, h].item()) for t in range(len(ids)) if ids[t] == row) for h in range(2)] for row in range(5)
    ]
    assert whole.total.tolist() == parts.total.tolist() == want


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("chunk", (1, 4, 1 << 18))
def test_totals_are_rounded_in_their_own_memory(dtype, chunk, monkeypatch):
    monkeypatch.setattr(batch_sum, "CHUNK", chunk)
    total = torch.randint(-(2**40), 2**40, (37,), generator=torch.Generator().manual_seed(0))
    apart = torch.empty(37, dtype=dtype)
    round_into(apart, total)
    inside = total.view(dtype)[:37]
    round_into(inside, total)
    assert same_bits(inside, apart)


def test_gradients_that_nobody_added_are_told_from_zeros():
    found = BatchSum.of(torch.zeros(SIZE, dtype=torch.int64))
    found.refuse(torch.zeros(SIZE))
    assert not found.foreign
    found.refuse(torch.tensor([0.0, math.nan, 0.0]))
    found.refuse(torch.zeros(SIZE))
    assert found.foreign
    found.reset()
    assert not found.foreign and not found.bound

"""Exact products and sums: their bits never depend on how the work is split; their error is bounded."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from patches.order.exact.products import exact_product, tree_of_products
from patches.order.exact.slices import rounded
from patches.order.exact.squares import sum_of_squares
from patches.order.exact.sums import exact_sum, tree_of_sums
from patches.order.tree import cuts, tree_sum
from tests.support.bits import same_bits
from tests.support.operands import DTYPES, HARD, KINDS, cases, operands, values

any_case = cases(KINDS, st.integers(0, 300))


@given(case=any_case, i=st.integers(0, 40), j=st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_product_has_same_bits_whatever_rows_and_columns_are_computed_with_it(case, i, j):
    a, b = operands(case)
    whole = exact_product(a, b)
    rows = torch.cat([exact_product(part, b) for part in (a[:i], a[i:]) if len(part)])
    columns = torch.cat([exact_product(a, part) for part in (b[:, :j], b[:, j:]) if part.shape[1]], 1)
    assert same_bits(whole, rows) and same_bits(whole, columns)


@given(case=any_case)
@settings(max_examples=60, deadline=None)
def test_product_has_same_bits_whatever_the_layout_batching_and_threads(case):
    a, b = operands(case)
    whole = exact_product(a, b)
    assert same_bits(whole, exact_product(a.contiguous(), b.contiguous()))
    assert same_bits(whole, exact_product(a.t().contiguous().t(), b))
    assert same_bits(whole, exact_product(torch.stack([a, a * 3]), torch.stack([b, b]))[0])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert same_bits(whole, exact_product(a, b))
    finally:
        torch.set_num_threads(threads)


@given(case=any_case)
@settings(max_examples=60, deadline=None)
def test_product_is_within_its_stated_bound_of_the_exact_value(case):
    a, b = operands({**case, "m": min(case["m"], 4), "n": min(case["n"], 4)})
    out = exact_product(a, b)
    for i in range(a.shape[0]):
        for j in range(b.shape[1]):
            terms = [Fraction(x) * Fraction(y) for x, y in zip(a[i].tolist(), b[:, j].tolist(), strict=True)]
            total, magnitude = sum(terms), sum(map(abs, terms))
            bound = abs(total) * Fraction(1, 2**24) + magnitude * Fraction(1, 2**47) + Fraction(1, 2**150)
            assert abs(total) > 3.4e38 or abs(Fraction(out[i, j].item()) - total) <= bound


@given(
    case=any_case,
    leaves=st.sampled_from((1, 2, 4, 8)),
    pieces=st.sampled_from((1, 2)),
    tp=st.sampled_from((1, 2, 4, 8)),
)
@settings(max_examples=150, deadline=None)
def test_tree_has_same_bits_at_every_tp(case, leaves, pieces, tp):
    tp = min(tp, leaves)
    case = {**case, "k": case["k"] // (tp * pieces) * tp * pieces}
    a, b = operands(case)
    whole = tree_of_products(a, b, leaves, pieces)
    shares_a = [torch.cat(a.chunk(tp * pieces, 1)[r::tp], 1) if case["k"] else a for r in range(tp)]
    shares_b = [torch.cat(b.chunk(tp * pieces, 0)[r::tp], 0) if case["k"] else b for r in range(tp)]
    roots = [tree_of_products(x, y, leaves // tp, pieces) for x, y in zip(shares_a, shares_b, strict=True)]
    assert same_bits(rounded(whole, torch.float32), rounded(tree_sum(roots), torch.float32))


@given(case=any_case, leaves=st.sampled_from((2, 8)), pieces=st.sampled_from((1, 2)), even=st.booleans())
@settings(max_examples=60, deadline=None)
def test_leaves_taken_at_once_are_those_taken_one_by_one(case, leaves, pieces, even):
    step = leaves * pieces if even else pieces
    a, b = operands({**case, "k": case["k"] // step * step})
    a_pieces, b_pieces = a.chunk(pieces, 1), b.chunk(pieces, 0)
    parts = [
        exact_product(torch.cat([x[:, lo:hi] for x in a_pieces], 1), torch.cat([x[lo:hi] for x in b_pieces], 0))
        for lo, hi in cuts(a.shape[1] // pieces, leaves)
    ]
    assert same_bits(tree_of_products(a, b, leaves, pieces), tree_sum(parts))
    sums = [exact_sum(a[:, lo:hi], 1).float() for lo, hi in cuts(a.shape[1], leaves)]
    assert same_bits(tree_of_sums(a, -1, leaves), tree_sum(sums))


@given(size=st.integers(0, 500), leaves=st.sampled_from((1, 2, 4, 8, 16)), tp=st.sampled_from((1, 2, 4, 8, 16)))
def test_a_rank_cuts_its_share_where_the_whole_dimension_is_cut(size, leaves, tp):
    tp = min(tp, leaves)
    size *= tp
    share = size // tp
    of_ranks = [(r * share + lo, r * share + hi) for r in range(tp) for lo, hi in cuts(share, leaves // tp)]
    assert of_ranks == cuts(size, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nans_are_what_ieee_says(dtype):
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -2.0, 3.0]).to(dtype)
    a = special[torch.randint(0, 8, (64, 5), generator=torch.Generator().manual_seed(0))]
    b = special[torch.randint(0, 8, (5, 64), generator=torch.Generator().manual_seed(1))]
    out = exact_product(a, b)
    want = torch.stack([sum((a[i, k].double() * b[k].double() for k in range(5)), torch.zeros(64)) for i in range(64)])
    assert same_bits(out, torch.where(want.isnan(), torch.full((), math.nan), want.float() + 0.0))


def test_product_keeps_a_row_of_tiny_values_beside_a_large_one():
    a = values("one-hot", (1, 2048), torch.float32, 0)
    b = values("normal", (2048, 1), torch.float32, 1)
    b[0] = 0.0
    want = math.fsum(x * y for x, y in zip(a[0].double().tolist(), b[:, 0].double().tolist(), strict=True))
    assert exact_product(a, b).item() == torch.tensor(want, dtype=torch.float64).float().item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_longest_leaf_is_exact(dtype):
    k = 1 << 20
    a, b = values("wide", (2, k), torch.float32, 2).clamp(-6e4, 6e4).to(dtype), values("normal", (k, 2), dtype, 3)
    want = [[math.fsum((a[i].double() * b[:, j].double()).tolist()) for j in range(2)] for i in range(2)]
    assert torch.allclose(exact_product(a, b).double(), torch.tensor(want, dtype=torch.float64), rtol=2**-23, atol=0)


def test_no_zero_is_negative():
    zero = torch.zeros(3, 4)
    assert same_bits(exact_product(-zero, zero.t()), torch.zeros(3, 3))
    assert same_bits(
        rounded(torch.tensor([-0.0, -1e-60], dtype=torch.float64), torch.bfloat16), torch.zeros(2).bfloat16()
    )


@pytest.mark.parametrize("shapes", (((0, 3), (3, 2)), ((2, 3), (3, 0)), ((2, 0), (0, 2)), ((0, 2, 3), (0, 3, 2))))
def test_empty_product_is_empty_or_zero(shapes):
    a, b = (torch.ones(shape).bfloat16() for shape in shapes)
    assert same_bits(exact_product(a, b, torch.bfloat16), torch.zeros(*a.shape[:-1], b.shape[-1], dtype=torch.bfloat16))


def test_float64_operands_are_refused():
    with pytest.raises(TypeError, match="float64"):
        exact_product(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))


@given(shape=st.tuples(st.integers(1, 6), st.integers(1, 200), st.integers(1, 4)), kind=st.sampled_from(KINDS),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))  # fmt: skip
@example(shape=(1, 200, 1), kind="wide", dtype=torch.float32, seed=0)
@settings(max_examples=100, deadline=None)
def test_sum_depends_on_the_summed_elements_alone(shape, kind, dtype, seed):
    x = values(kind, shape, dtype, seed)
    total = exact_sum(x, 1)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    assert torch.equal(total, exact_sum(x[:, order], 1))
    assert torch.equal(total[:1], exact_sum(x[:1], 1))
    assert torch.equal(total, exact_sum(x.transpose(1, 2), 2))
    want = torch.tensor([[math.fsum(column) for column in row.t().tolist()] for row in x.double()], dtype=torch.float64)
    assert bool(((total - want).abs() <= 2**-50 * x.double().abs().sum(1)).all())


@given(seed=st.integers(0, 100), tokens=st.integers(1, 50), leaves=st.sampled_from((1, 2, 8)))
@settings(max_examples=40, deadline=None)
def test_tree_of_sums_has_same_bits_at_every_split_over_ranks(seed, tokens, leaves):
    x = values("wide", (tokens * leaves, 3, 2), torch.float32, seed)
    whole = tree_of_sums(x, 0, leaves, (1,))
    for tp in (t for t in (1, 2, 4, 8) if t <= leaves):
        roots = [tree_of_sums(part, 0, leaves // tp, (1,)) for part in x.chunk(tp)]
        assert torch.equal(whole, tree_sum(roots))


@given(
    kind=st.sampled_from(HARD),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dim=st.integers(0, 3),
    others=st.sets(st.integers(0, 3)),
    leaves=st.sampled_from((1, 2, 4, 8)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_leaves_of_any_length_are_summed_as_if_one_by_one(kind, shape, dim, others, leaves, dtype, seed):
    x = values(kind, (*shape, 2), dtype, seed)[..., 0]
    dim %= x.dim()
    exact_dims = tuple(d for d in sorted(others) if d < x.dim() and d != dim)
    parts = [x.narrow(dim, lo, hi - lo) for lo, hi in cuts(shape[dim], leaves)]
    one_by_one = tree_sum(exact_sum(part, (dim, *exact_dims)).float() for part in parts)
    assert same_bits(tree_of_sums(x, dim, leaves, exact_dims), one_by_one)


def test_tree_sum_adds_adjacent_pairs():
    parts = [torch.tensor(v) for v in (1e8, 1.0, -1e8, 1.0)]
    assert tree_sum(parts).item() == ((torch.tensor(1e8) + 1) + (torch.tensor(-1e8) + 1)).item()
    assert tree_sum(parts[:3]).item() == ((torch.tensor(1e8) + 1) + -1e8).item()


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=6), kind=st.sampled_from(KINDS), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_sum_of_squares_does_not_depend_on_the_layout(sizes, kind, seed):
    flat = values(kind, (1, sum(sizes) + 1), torch.float32, seed)[0]
    grid = 2.0 ** flat.abs().max().double().frexp().exponent.item()
    whole = sum_of_squares([flat], grid)
    pieces = list(flat.split([*sizes, 1]))
    assert torch.equal(whole, sum(sum_of_squares([p], grid) for p in reversed(pieces)))
    want = math.fsum(v * v for v in flat.double().tolist())
    assert math.isclose(math.fsum(whole.tolist()), want, rel_tol=2**-46)

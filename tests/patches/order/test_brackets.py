"""Products and sums that were told from bounds alone have the very bits that `order.slices` defines."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patches.order.exact import brackets, norm
from patches.order.exact.products import exact_product, tree_of_products
from patches.order.exact.slices import rounded, sliced_product, sliced_sum
from patches.order.exact.sums import exact_sum, rounded_sum, sum_bounds, tree_of_sums
from tests.support.bits import same_bits
from tests.support.operands import DTYPES, HARD, cases, operands, values

hard_cases = cases(HARD, st.one_of(st.integers(1, 3), st.integers(1, 300)))


def defined(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """What a product is, by definition."""
    return rounded(sliced_product(a.double(), b.double()), torch.float32).to(dtype)


def large(dtype: torch.dtype, a_kind: str, b_kind: str) -> dict[str, Any]:
    """A result of several blocks, and, in a batch, of more than is taken at once."""
    return {"m": 130, "n": 640, "k": 300, "dtype": dtype, "a_kind": a_kind, "b_kind": b_kind, "seed": 0}


@given(case=hard_cases, narrow=st.booleans(), batch=st.sampled_from((0, 1, 5)), layout=st.integers(0, 3))
@example(case=large(torch.bfloat16, "normal", "normal"), narrow=False, batch=0, layout=2)
@example(case=large(torch.float32, "one-hot", "ties"), narrow=False, batch=0, layout=0)
@example(case=large(torch.bfloat16, "wide", "normal"), narrow=True, batch=4, layout=1)
@settings(max_examples=300, deadline=None)
def test_product_is_what_its_slices_add_up_to(case, narrow, batch, layout):
    a, b = operands(case)
    if batch:
        a, b = torch.stack([a, *[a.roll(i, 0) for i in range(1, batch)]]), torch.stack([b] * batch)
    a = a.mT.contiguous().mT if layout & 1 else a
    b = b.contiguous() if layout & 2 else b
    dtype = case["dtype"] if narrow else torch.float32
    assert same_bits(exact_product(a, b, dtype), defined(a, b, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_alone_do_not_tell_a_product(dtype, monkeypatch):
    """Without this the test above might never see an element that is computed anew."""
    a, b = (values(kind, (40, 200), dtype, i) for i, kind in enumerate(("ties", "ties")))
    monkeypatch.setattr(brackets._Product, "_settle", lambda *args: None)
    monkeypatch.setattr(brackets, "SHORT", {})
    assert not same_bits(exact_product(a, b.t()), defined(a, b.t(), torch.float32))


def near_ties(dtype: torch.dtype, k: int, range_: int, seed: int) -> Tensor:
    """Rows [24, k + 12] whose exact sums lie on a tie of float32, or beside it by 2^-45 to 2^-60 of themselves."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-range_, range_ + 1, (24, k), generator=g).float())
    terms = (torch.randn(24, k, generator=g) * scale).to(dtype)
    third = k // 3
    terms[12:, :third] *= 64  # cancelled by others, so that partial sums are far above the sum
    terms[12:, third : 2 * third] = -terms[12:, :third]
    rows = []
    for row, beside in zip(terms.tolist(), [0, 45, -45, 48, -48, 50, -50, 52, -52, 54, -54, 60] * 2, strict=True):
        total = sum(map(Fraction, row))
        near = torch.tensor(float(total)).float()
        tie = (Fraction(near.item()) + Fraction(torch.nextafter(near, near * 2).item())) / 2
        power = Fraction(2) ** (math.frexp(near.item())[1] - abs(beside))
        missing = tie - total + (power if beside > 0 else -power if beside else 0)
        rest = []
        for _ in range(12):
            rest.append(torch.tensor(float(missing)).to(dtype).item())
            missing -= Fraction(rest[-1])
        rows.append(row + rest)
    return torch.tensor(rows).to(dtype)[:, torch.randperm(k + 12, generator=g)]


@given(dtype=st.sampled_from((torch.float32, torch.bfloat16)), k=st.integers(1, 300), range_=st.integers(0, 20),
       seed=st.integers(0, 1000))  # fmt: skip
@example(dtype=torch.float32, k=300, range_=4, seed=0)
@example(dtype=torch.bfloat16, k=300, range_=12, seed=0)
@example(dtype=torch.bfloat16, k=300, range_=0, seed=0)
@settings(max_examples=80, deadline=None)
def test_sum_beside_a_tie_falls_to_the_side_that_its_slices_say(dtype, k, range_, seed):
    x = near_ties(dtype, k, range_, seed)
    factors = torch.exp2(torch.arange(x.shape[1]) % 3.0).neg()
    a, b = (x / factors).to(dtype), torch.stack([factors, torch.ones_like(factors)], 1).to(dtype)
    assert same_bits(exact_product(a, b), defined(a, b, torch.float32))
    ones = torch.ones(x.shape[1], 1, dtype=dtype)
    assert same_bits(exact_product(x, ones), defined(x, ones, torch.float32))
    assert same_bits(rounded_sum(x, 1), exact_sum(x, 1).float())


@pytest.mark.parametrize("low", (2.0**-70, -(2.0**-70)))
def test_product_next_to_a_tie_is_rounded_as_its_slices_are_added(low):
    """1 + 2^-24 is a tie in float32; the slice of 2^-70 is lost where it is added to the others in float64."""
    a = torch.tensor([[1.0, 2.0**-24, low], [1.0, 3 * 2.0**-24, low]])
    out = exact_product(a, torch.ones(3, 1))
    assert out.flatten().tolist() == [1.0, 1 + 2.0**-22]
    assert same_bits(out, defined(a, torch.ones(3, 1), torch.float32))


def spread(shape: tuple[int, ...], dtype: torch.dtype, seed: int, low: int, high: int) -> Tensor:
    """24 random bits at random exponents, from `low` up: the same everywhere."""
    g = torch.Generator().manual_seed(seed)
    digits = torch.randint(-(2**24), 2**24, shape, generator=g).double()
    return torch.ldexp(digits, torch.randint(low, high, shape, generator=g)).to(dtype)


GOLDEN = {
    torch.float32: ((-120, 20), "ee20b5a58de37dde 8082bc02817370cc 477fdb658af8d046 14503c3706bdd54e"),
    torch.bfloat16: ((-40, -20), "0a8b41e95b7d4039 84383eacbe2279dc a445001a0df12cb2 a84afc107651a08d"),
    torch.float16: ((-38, -22), "d3e6c195a2ae518f 939e778a2067c2bb 2c5b74489d485f90 0848577a2b76d373"),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_and_sums_keep_the_bits_that_runs_were_made_with(dtype):
    (low, high), want = GOLDEN[dtype]
    a, b = spread((70, 600), dtype, 0, low, high), spread((90, 600), dtype, 1, -26, -22)
    found = (
        exact_product(a, b.t()), tree_of_products(a, b.t(), 8, 2), exact_sum(a, 1), tree_of_sums(a, 1, 8),
    )  # fmt: skip
    digests = [hashlib.sha256(bytes(x.contiguous().view(torch.uint8).flatten().tolist())) for x in found]
    assert " ".join(digest.hexdigest()[:16] for digest in digests) == want


@given(shape=st.tuples(st.integers(1, 6), st.integers(1, 200), st.integers(1, 4)), kind=st.sampled_from(HARD),
       dtype=st.sampled_from(DTYPES), dims=st.sampled_from(((1,), (0,), (2, 0), (-1, 1), (0, 1, 2))),
       keepdim=st.booleans(), seed=st.integers(0, 1000))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_rounded_sum_is_the_exact_sum_rounded(shape, kind, dtype, dims, keepdim, seed):
    x = values(kind, shape, dtype, seed)
    want = exact_sum(x, dims, keepdim)
    assert same_bits(rounded(rounded_sum(x, dims, keepdim), torch.float32), rounded(want, torch.float32))
    low, high = sum_bounds(x.double(), [d % 3 for d in dims], keepdim)
    assert bool(((low <= want) & (want <= high) | ~want.isfinite()).all())


@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 200)), kind=st.sampled_from(HARD), centered=st.booleans(),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_norm_and_its_gradient_are_made_of_exact_sums(shape, kind, centered, dtype, seed):
    x, dy, gamma = (
        values(kind, shape, dtype, seed),
        values("wide", shape, dtype, seed),
        values("normal", shape, dtype, 7)[0],
    )

    def mean_of(terms: Tensor) -> Tensor:
        return sliced_sum(terms.to(torch.float64, copy=True)).unsqueeze(-1) / shape[1]

    y, mean, rstd = norm.normalised(x, gamma, None, 1e-5, centered)
    wide = x.double() - mean_of(x) if centered else x.double()
    scale = 1.0 / torch.sqrt(mean_of(wide.square()) + 1e-5)
    assert torch.equal(rstd.nan_to_num(7), scale.nan_to_num(7))
    assert same_bits(y, rounded((wide * scale).float() * gamma.float(), dtype))
    hat, g = (wide * scale).float(), (dy.float() * gamma.float()).double()
    dx = g - hat * mean_of(g * hat)
    want = rounded((dx - mean_of(g) if centered else dx) * scale, dtype)
    assert same_bits(norm.input_gradient(dy, x, gamma, mean, rstd), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(small=st.integers(0, 60), size=st.integers(2, 300), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_mean_of_squares_is_exact_where_a_plain_sum_rounds(dtype, small, size, seed):
    small = min(small, 8 if dtype == torch.float16 else 60)
    x = torch.cat(
        [values("normal", (3, 1), dtype, seed), values("normal", (3, size), dtype, seed + 1) * 2.0**-small], 1
    )
    squares = x.double().square()
    mean = norm._exact_mean(squares, x)
    assert mean is None or torch.equal(mean, sliced_sum(squares).unsqueeze(-1) / (size + 1))

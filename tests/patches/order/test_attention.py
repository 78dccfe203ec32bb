"""Attention by blocks of keys in torch, the CPU's: right, and every row a function of its own operands alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patches.order import exact
from patches.order.exact.exponentials import exp2
from patches.order.polynomials import ULPS
from patches.order.visible import Packed, Visible, keys_at_once
from tests.support.attention_bounds import assert_right, assert_rows_see_their_own_alone, operands, results

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 150), st.integers(1, 150), st.sampled_from(((1, 1), (4, 2), (3, 1))), st.integers(1, 40),
    st.none() | st.integers(0, 160), st.none() | st.integers(0, 160), st.integers(0, 150), st.sampled_from(DTYPES),
)  # fmt: skip
def test_every_band_length_and_grouping_is_right(S, T, heads, D, left, right, offset, dtype):
    assert_right(exact, operands(S, T, 2, *heads, D, dtype), Visible(left, right, offset))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("visible", (Visible(right=0), Visible(left=50, right=0)), ids=str)
@pytest.mark.parametrize("D", (80, 256))
def test_rows_see_their_own_alone(D, visible, dtype):
    assert_rows_see_their_own_alone(exact, "cpu", dtype, 2 * keys_at_once(D, dtype) + 11, D, visible)


def test_gradients_are_those_of_finite_differences():
    """Of float32 results, so that a step may not be small: errors of its square, and of a rounding over it."""
    step, visible = 2.0**-8, Visible(left=30, right=0)
    qkvd = operands(40, 40, 1, 2, 1, 4, torch.float32)
    gradients = results(exact, qkvd, visible)[1:]
    gradients[1:] = [x.sum(2, keepdim=True) for x in gradients[1:]]
    for which, gradient in enumerate(gradients):
        direction = torch.randn_like(qkvd[which])
        ends = []
        for sign in (1, -1):
            moved = [*qkvd]
            moved[which] = qkvd[which] + sign * step * direction
            y = exact.attention(*moved[:3], visible, 0.3)[0]
            ends.append((y.double() * qkvd[3]).sum())
        slope = float(ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((gradient.double() * direction).sum()), rel=1e-3, abs=2e-2)


def test_a_query_that_sees_no_key_has_zeros():
    q, k, v, dy = operands(6, 3, 1, 1, 1, 8, torch.bfloat16)
    y, dq, dk, dv = results(exact, [q, k, v, dy], Visible(left=0, right=0))
    assert y[:3].any() and not y[3:].any() and not dq[3:].any()
    again = results(exact, [q[:3], k, v, dy[:3]], Visible(left=0, right=0))
    assert torch.equal(dk, again[2]) and torch.equal(dv, again[3])


def test_nan_and_infinity_reach_the_rows_that_see_them():
    q, k, v, _ = operands(5, 5, 1, 1, 1, 8, torch.float32)
    k[2, 0, 0, 0] = math.nan
    y = exact.attention(q, k, v, Visible(right=0), 0.3)[0]
    assert y[:2].isfinite().all() and y[2:].isnan().all()


def test_power_of_two_is_within_its_bound():
    x = torch.cat([-torch.rand(1 << 20) * 126, torch.linspace(-0.5, 0.5, 1 << 20), torch.arange(-126.0, 127.0)])
    right = torch.exp2(x.double())
    assert ((exp2(x).double() - right).abs() <= ULPS * 2.0**-24 * right).all()
    assert torch.equal(exp2(torch.arange(-126.0, 127.0)), torch.exp2(torch.arange(-126.0, 127.0)))
    assert exp2(torch.tensor([-math.inf, -127.0, -500.0])).tolist() == [0.0] * 3
    assert exp2(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    (
        ({"k": (5, 1, 2, 9)}, ValueError, r"G a divisor of H: \(5, 1, 2, 8\)"),
        ({"q": (5, 1, 3, 8)}, ValueError, "G a divisor of H"),
        ({"v": (6, 1, 2, 8)}, ValueError, "G a divisor of H"),
        ({"scale": 0.0}, ValueError, r"scale=0\.0: use a number above 0"),
        ({"dtype": torch.float64}, TypeError, "of one dtype, float32, bfloat16 or float16"),
        ({"q": (5, 1, 2, 257), "k": (5, 1, 2, 257), "v": (5, 1, 2, 257)}, ValueError, "takes 1 to 256"),
    ),
)
def test_operands_that_are_not_covered_are_refused(change, error, words):
    dtype = change.get("dtype", torch.float32)
    q, k, v = (torch.zeros(change.get(name, (5, 1, 2, 8)), dtype=dtype) for name in "qkv")
    with pytest.raises(error, match=words):
        exact.attention(q, k, v, Visible(), change.get("scale", 1.0))


def test_a_band_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match="left=-1 is below 0: use None"):
        Visible(left=-1)


def test_packed_sequences_are_what_their_cumulated_lengths_say():
    found = Packed.of(torch.tensor([0, 3, 5]), torch.tensor([0, 2, 9]), torch.tensor([0, 4, 8]))
    assert [x.tolist() for x in (found.q_starts, found.q_lengths, found.k_starts, found.k_lengths)] == [
        [0, 4], [3, 2], [0, 2], [2, 7],
    ]  # fmt: skip
    assert (found.longest_q, found.longest_k) == (3, 7)

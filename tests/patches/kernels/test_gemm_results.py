"""What becomes of a product's root, and operands that are none: scaled, rounded, added, empty, refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.order.batch_sum import exceeds
from patches.order.grid import UNIT, in_units
from patches.order.kernels.gemm import add_product_in_units, product
from tests.patches.kernels.gemm_operands import DTYPES, operands
from tests.support.bits import assert_same_bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_is_one_multiplication_of_the_root(dtype, device):
    a, b = operands(70, 90, 64, device, dtype)
    a[1] = 0
    for scale in (0.08838834764831845, -3.0):
        assert_same_bits(product(a, b, 2, dtype=dtype, scale=scale), product(a, b, 2).mul_(scale).to(dtype))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_root_is_rounded_once(dtype, device):
    a, b = operands(130, 140, 512, device, dtype)
    assert_same_bits(product(a, b, 4, dtype=dtype), product(a, b, 4).to(dtype))


@pytest.mark.parametrize("leaves", (1, 4))
def test_product_is_added_into_float32_in_one_addition(leaves, device):
    a, b = operands(130, 140, 256, device, layout="aᵀb")
    before = torch.randn(140, 260, device=device).T[::2]
    into = before.clone(memory_format=torch.preserve_format)
    assert product(a, b, leaves, into=into) is into
    assert_same_bits(into, before + product(a, b, leaves))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_product_is_added_in_units_as_if_rounded_by_itself(dtype, device):
    a, b = operands(130, 140, 64, device, dtype, layout="aᵀb")
    a *= 2.0 ** torch.randint(-45, 28, (130, 1), device=device)  # below half a unit, all fractions, none
    before = torch.randint(-(1 << 62), 1 << 62, (130, 140), device=device)
    total, bound = before.clone(), torch.ones((), dtype=torch.float64, device=device)
    add_product_in_units(total, bound, a, b)
    y = product(a, b)
    assert torch.equal(total, before + in_units(y)) and bound == 1 + y.abs().max().double()


def test_halves_of_units_are_rounded_to_even(device):
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.50001, -1.49999, 2.0**23 - 0.5, 0.5 - 2.0**23, 0.0])
    total, bound = (
        torch.zeros(1, 11, dtype=torch.int64, device=device),
        torch.zeros((), dtype=torch.float64, device=device),
    )
    add_product_in_units(total, bound, torch.full((1, 1), UNIT, device=device), halves[None].to(device))
    assert total.flatten().tolist() == [0, 2, 2, 0, -2, -2, 1, -1, 1 << 23, -(1 << 23), 0]


@pytest.mark.parametrize("x", (torch.inf, torch.nan))
def test_what_is_not_finite_is_beyond_every_bound(x, device):
    a, b = operands(40, 40, 64, device)
    a[3, 5] = x
    total, bound = (
        torch.zeros(40, 40, dtype=torch.int64, device=device),
        torch.zeros((), dtype=torch.float64, device=device),
    )
    add_product_in_units(total, bound, a, b)
    assert exceeds(bound)


def test_zeros_are_positive(device):
    a, b = operands(40, 40, 64, device, torch.float16)
    a[1], b[:, 2] = -0.0, -0.0
    a[3], b[:, 4] = -6e-8, 6e-8
    y = product(a, b, dtype=torch.float16)
    assert (y[1] == 0).all() and (y[:, 2] == 0).all() and y[3, 4] == 0
    assert not y[y == 0].signbit().any()


def test_empty_products(device):
    for M, N, K in ((0, 5, 3), (5, 0, 3), (5, 3, 0)):
        a, b = operands(M, N, K, device)
        assert_same_bits(product(a, b, leaves=4), torch.zeros(M, N, device=device))
    into = torch.ones(5, 3, device=device)
    assert_same_bits(product(a, b, into=into), torch.ones(5, 3, device=device))


def test_bad_operands_are_refused(device):
    a, b = operands(4, 5, 6, device)
    for error, arguments in (
        (TypeError, {"a_MK": a.double(), "b_KN": b.double()}),
        (TypeError, {"b_KN": b.half()}),
        (TypeError, {"dtype": torch.float64}),
        (TypeError, {"into": torch.zeros(4, 5, device=device, dtype=torch.bfloat16)}),
        (ValueError, {"into": torch.zeros(5, 4, device=device)}),
        (ValueError, {"b_KN": b.T}),
        (ValueError, {"a_MK": a.unsqueeze(0)}),
        (ValueError, {"leaves": 3}),
        (ValueError, {"pieces": 3}),
        (ValueError, {"a_MK": a[:, :5], "b_KN": b[:5], "pieces": 2}),
    ):
        with pytest.raises(error):
            product(**{"a_MK": a, "b_KN": b, **arguments})

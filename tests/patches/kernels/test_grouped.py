"""Several products in one launch: each has the bits that it has alone, whatever is beside it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.order import exact
from patches.order.kernels.gemm import add_product_in_units, product
from patches.order.kernels.grouped import add_grouped_products_in_units, grouped_product
from tests.patches.kernels.gemm_operands import assert_right
from tests.support.bits import assert_same_bits

SIZES = [5, 0, 150, 1]  # rows of each expert: less than a tile, none, more than one, one


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize(("leaves", "pieces"), ((1, 1), (1, 2), (4, 1), (8, 2)))
def test_rows_have_the_bits_of_their_own_product(dtype, leaves, pieces, device):
    x = torch.randn(sum(SIZES), 96, device=device).to(dtype)
    matrices = [torch.randn(70, 96, device=device).to(dtype).t() for _ in SIZES]
    y = grouped_product(x, matrices, SIZES, leaves, pieces, dtype)
    alone = [product(*one, leaves, pieces, dtype) for one in zip(x.split(SIZES), matrices, strict=True)]
    assert_same_bits(y, torch.cat(alone))
    assert_right(grouped_product(x, matrices, SIZES, leaves, pieces)[5:155], x[5:155], matrices[2], leaves, pieces)


@pytest.mark.parametrize("strided", (False, True), ids=("whole", "strided"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_runs_are_added_to_their_totals_as_one_by_one(dtype, strided, device):
    runs = [[3, 2], [], [100, 7, 43], [1]]
    dy, x = (torch.randn(156, 2 * width, device=device).to(dtype) for width in (40, 33))
    dy, x = (t[:, ::2] if strided else t[:, : t.shape[1] // 2].contiguous() for t in (dy, x))
    before = [torch.randint(-(1 << 40), 1 << 40, (40, 33), device=device) for _ in runs]
    totals, alone = ([t.clone() for t in before] for _ in range(2))
    bounds, others = ([torch.ones((), dtype=torch.float64, device=device) for _ in runs] for _ in range(2))
    add_grouped_products_in_units(totals, bounds, dy, x, runs)
    start = 0
    for total, bound, of_total in zip(alone, others, runs, strict=True):
        for size in of_total:
            add_product_in_units(total, bound, dy[start : start + size].t(), x[start : start + size])
            start += size
    assert all(map(torch.equal, totals, alone))
    # The largest values of one total's runs are added in float64, in some order.
    torch.testing.assert_close(torch.stack(bounds), torch.stack(others), rtol=2.0**-50, atol=0)


def test_no_rows_at_all(device):
    x, weight = torch.randn(0, 32, device=device), torch.randn(48, 32, device=device)
    assert grouped_product(x, [weight.t()] * 2, [0, 0]).shape == (0, 48)
    totals, bounds = [torch.zeros(48, 32, dtype=torch.int64, device=device)], [torch.zeros((), device=device).double()]
    add_grouped_products_in_units(totals, bounds, torch.randn(0, 48, device=device), x, [[]])
    assert not totals[0].any() and not bounds[0]


def test_exact_ones_are_those_of_each_run():
    x = torch.randn(sum(SIZES), 24)
    matrices = [torch.randn(7, 24).t() for _ in SIZES]
    alone = [exact.product(*one, 4) for one in zip(x.split(SIZES), matrices, strict=True)]
    assert_same_bits(exact.grouped_product(x, matrices, SIZES, 4), torch.cat(alone))

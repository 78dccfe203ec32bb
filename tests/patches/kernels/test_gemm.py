"""Products of `kernels.gemm`: right against the exact product, and the same bits however they are cut or laid out.

Without a GPU, Triton's interpreter runs the kernel on NumPy. It proves what is index arithmetic: which elements are
multiplied, masked, added into which leaf, in which order leaves meet, where results are stored. It says nothing
about the order inside one k step (NumPy's), the tensor cores' arithmetic, races, layouts and speed. Its own bfloat16
is wrong in two ways (products of the bits as integers, conversions that do not round to nearest), so there the kernel
widens operands itself and torch rounds the result. On a GPU the same tests run on the compiled kernel.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.order.kernels import plans
from patches.order.kernels.gemm import product
from patches.order.tree import cuts, tree_sum
from tests.patches.kernels.gemm_operands import DTYPES, LAYOUTS, assert_right, operands, replan
from tests.support.bits import assert_same_bits


@pytest.fixture(params=(True, False), ids=("tma", "pointers"))
def loads(request, monkeypatch):
    """Both ways to load, where the operands leave the choice."""
    if not request.param:
        replan(monkeypatch, suits_tma=lambda *_: False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("loads")
def test_product_is_right_in_every_layout_and_dtype(layout, dtype, device):
    a, b = operands(136, 264, 256, device, dtype, layout)
    assert_right(product(a, b, leaves=2), a, b, leaves=2)


@pytest.mark.parametrize("pieces", (1, 2))
@pytest.mark.parametrize("leaves", (1, 2, 4, 8, 16))
def test_product_is_right_at_every_number_of_leaves(leaves, pieces, device):
    a, b = operands(72, 80, 2 * 64 * leaves, device, layout="ab")
    assert_right(product(a, b, leaves, pieces), a, b, leaves, pieces)


@pytest.mark.parametrize("K", (1, 7, 65, 250, 1000))
@pytest.mark.parametrize(("leaves", "pieces"), ((1, 1), (8, 1), (4, 2)))
def test_product_is_right_at_ragged_sizes(K, leaves, pieces, device):
    a, b = operands(129, 131, K * pieces, device)
    assert_right(product(a, b, leaves, pieces), a, b, leaves, pieces)


def test_product_is_right_with_more_tiles_than_programs(device):
    a, b = operands(1300, 1300, 64, device, torch.float16)
    assert_right(product(a, b), a, b)


@pytest.mark.parametrize(("layout", "leaves"), (("abᵀ", 1), ("ab", 4), ("aᵀb", 1), ("aᵀbᵀ", 2)))
def test_every_split_of_rows_and_columns_has_same_bits(layout, leaves, device):
    a, b = operands(300, 270, 512, device, layout=layout)
    whole = product(a, b, leaves)
    for rows, columns in ((slice(0, 1), slice(0, 270)), (slice(150, 300), slice(135, 270)), (slice(7, 9), slice(3, 5))):
        assert_same_bits(product(a[rows], b[:, columns], leaves), whole[rows, columns])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", (8 * 64, 8 * 65 + 2))
def test_tree_over_parts_of_the_leaves_has_same_bits(K, dtype, device):
    a, b = operands(130, 140, K, device, dtype)
    whole = product(a, b, leaves=8)
    for parts in (8, 2):
        roots = [product(a[:, lo:hi], b[lo:hi], leaves=8 // parts) for lo, hi in cuts(K, parts)]
        assert_same_bits(tree_sum(roots), whole)


def test_gated_leaves_are_gate_then_up_in_one_accumulator(device):
    a, b = operands(130, 140, 2 * 4 * 64, device, layout="ab")
    a_TPK, b_PKN = a.unflatten(1, (2, -1)), b.unflatten(0, (2, -1))
    gated = [(a_TPK[:, :, lo:hi].flatten(1), b_PKN[:, lo:hi].flatten(0, 1)) for lo, hi in cuts(4 * 64, 4)]
    assert_same_bits(product(a, b, leaves=4, pieces=2), tree_sum([product(x, y) for x, y in gated]))


@pytest.mark.parametrize(("leaves", "pieces"), ((1, 1), (4, 1), (2, 2)))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("K", (512, 4 * 72))
def test_tma_and_pointers_have_same_bits(K, layout, leaves, pieces, device, monkeypatch):
    a, b = operands(136, 264, K, device, layout=layout)
    suits_tma, chosen = plans.suits_tma, []
    replan(monkeypatch, suits_tma=lambda *args: chosen.append(suits_tma(*args)) or chosen[-1])
    by_tma = product(a, b, leaves, pieces)
    assert chosen == [True, True]
    replan(monkeypatch, suits_tma=lambda *_: False)
    assert_same_bits(product(a, b, leaves, pieces), by_tma)


@pytest.mark.parametrize("layout", ("abᵀ", "aᵀb"))
def test_operands_of_any_strides_have_the_bits_of_their_copies(layout, device):
    a, b = operands(150, 140, 4 * 64, device, layout=layout)
    expected = product(a, b, leaves=4)
    for wider in ((1, 3), (2, 1), (3, 2)):
        strided = []
        for x in (a, b):
            buffer = torch.full((x.shape[0] * wider[0], x.shape[1] * wider[1]), math.nan, dtype=x.dtype, device=device)
            view = buffer[:: wider[0], :: wider[1]]
            strided.append(view.copy_(x))
        assert_same_bits(product(*strided, leaves=4), expected)
    row, column = torch.randn(2, 4 * 64, device=device).to(a.dtype)
    stretched = row.expand(150, -1), column.unsqueeze(1).expand(-1, 140)
    assert_same_bits(product(*stretched, leaves=4), product(*(x.contiguous() for x in stretched), leaves=4))


@pytest.mark.parametrize("K", (4 * 64, 4 * 50 + 1))
def test_nothing_outside_the_operands_is_touched(K, device):
    """0·NaN is NaN: masks must hold on both operands."""
    a, b = operands(130, 140, K, device)
    inner = slice(64, 64 + K)
    a_padded, b_padded = (torch.full((256, K + 128), math.nan, dtype=a.dtype, device=device) for _ in range(2))
    a_padded[8:138, inner], b_padded[16:156, inner] = a, b.T
    y = product(a_padded[8:138, inner], b_padded[16:156, inner].T, leaves=4)
    assert_same_bits(y, product(a, b, leaves=4))


def test_infinities_and_nans_stay_in_their_row_and_column(device):
    a, b = operands(140, 140, 128, device)
    expected = product(a, b, leaves=2)
    a[3, 5], b[77, 9] = math.nan, math.inf
    y = product(a, b, leaves=2)
    kept = torch.ones_like(y, dtype=torch.bool)
    kept[3], kept[:, 9] = False, False
    assert_same_bits(y[kept], expected[kept])
    assert not y[~kept].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("K", (64, 40))
def test_batch_has_the_bits_of_its_products_one_by_one(K, layout, device):
    a, b = operands(132, 72, K, device, layout=layout, batch=(3,))
    expected = torch.stack([product(a[i], b[i], dtype=torch.bfloat16) for i in range(3)])
    assert_same_bits(product(a, b, dtype=torch.bfloat16), expected)


def test_batch_of_interleaved_heads_needs_no_copy(device):
    """[s, b·h, d], as attention holds them: products over d, and over s."""
    q, k = (torch.randn(72, 6, 64, device=device).bfloat16().transpose(0, 1) for _ in range(2))
    scores = product(q, k.mT, dtype=torch.bfloat16)
    assert_same_bits(scores, product(q.contiguous(), k.contiguous().mT, dtype=torch.bfloat16))
    assert_same_bits(product(scores, k), product(scores, k.contiguous()))


@pytest.mark.gpu
def test_offsets_beyond_31_bits(device):
    a = torch.randn(3, 1 << 30, dtype=torch.bfloat16, device=device)[:, :256]
    b = torch.randn(3, 1 << 30, dtype=torch.bfloat16, device=device)[:, :256].T
    for leaves, K in ((1, 256), (4, 256), (4, 250)):
        x, y = a[:, :K], b[:K]
        assert_same_bits(product(x, y, leaves), product(x.contiguous(), y.contiguous(), leaves))

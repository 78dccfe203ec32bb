"""Sums and norms on a GPU: the bits of adjacent pairs, whatever is cut, aligned or laid out in which way.

Additions and multiplications round alike in the interpreter and on a GPU, so both are held to the same bits, which
torch computes on the CPU. The interpreter says nothing of layouts, races and speed.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.order.exact import norm as exact_norm
from patches.order.exact.sums import exact_sum
from patches.order.kernels import norm
from patches.order.kernels.sums import row_sums, sums_of_rows, tree_of_gamma_gradients, tree_of_sums
from patches.order.tree import tree_sum
from patches.order.x_hat import x_hat
from tests.patches.kernels.by_pairs import DTYPES, assert_close, by_pairs, leaves_by_pairs
from tests.support.bits import assert_same_bits

EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", (0, 1, 2, 3, 100, 1025, 4097))
def test_rows_and_columns_are_summed_by_pairs(n, dtype, device):
    x = torch.randn(2, n, 3).to(device, dtype)
    assert_same_bits(row_sums(x, [1]), by_pairs(x, 1))
    one = x[..., 1]  # one column alone: another kernel
    assert_same_bits(row_sums(one, [1]), by_pairs(one))
    assert_same_bits(row_sums(one, [0, 1], keepdim=True), by_pairs(one.flatten()).view(1, 1))
    assert_same_bits(row_sums(x[:, :50], [0]), by_pairs(x[:, :50], 0))
    assert_same_bits(sums_of_rows(one.contiguous(), one.contiguous()), by_pairs(one.cpu().float() ** 2))
    depth = math.ceil(math.log2(max(n, 2)))
    assert_close(row_sums(x, [1]), exact_sum(x.cpu(), 1), depth * 2.0**-24 * exact_sum(x.cpu().abs(), 1))


def test_alignment_has_no_say(device):
    for n in (64, 100, 2048):
        wide = torch.randn(3 * n + 8).to(device)
        for skip in (0, 1, 3):
            rows = wide[skip : skip + 3 * n].view(3, n)
            assert_same_bits(row_sums(rows, [1]), by_pairs(rows))
            assert_same_bits(row_sums(rows[:, :50], [0]), by_pairs(rows[:, :50], 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((5, 2, 40), (136, 3, 130)))
def test_leaves_of_tokens_make_the_same_tree_on_every_rank(shape, dtype, device):
    x = torch.randn(shape).to(device, dtype)
    whole = tree_of_sums(x, 0, 8, (1,))
    assert_same_bits(whole, leaves_by_pairs(x, 8))
    for size in (2, 4):
        if shape[0] % size == 0:
            parts = [tree_of_sums(part, 0, 8 // size, (1,)) for part in x.chunk(size)]
            assert_same_bits(tree_sum(parts), whole)
    assert_same_bits(tree_of_sums(x.transpose(1, 2).contiguous().transpose(1, 2), 0, 8, (1,)), whole)
    assert_same_bits(tree_of_sums(x[..., 0], 0, 4, (1,)), leaves_by_pairs(x[..., :1], 4).squeeze(-1))


@pytest.mark.parametrize("heads", (8, 12))
def test_leaves_of_heads_take_tokens_in_order(heads, device):
    x = torch.randn(7, 2, heads, 16).to(device)
    whole = tree_of_sums(x, 2, 4, (0, 1))
    leaf = heads // 4
    assert_same_bits(whole, tree_sum(by_pairs(part.reshape(-1, 16), 0) for part in x.split(leaf, 2)))
    halves = [tree_of_sums(part, 2, 2, (0, 1)) for part in x.chunk(2, 2)]
    assert_same_bits(tree_sum(halves), whole)
    grouped = x.unflatten(2, (2, -1))  # the query heads of a key: nothing but them is summed
    assert_same_bits(
        tree_of_sums(grouped, 3, 2), tree_sum(by_pairs(part, 3) for part in grouped.split([heads // 4] * 2, 3))
    )


@pytest.mark.parametrize("centered", (False, True), ids=("rmsnorm", "layernorm"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("h", (16, 100, 1100))
def test_norm_is_right_and_a_row_does_not_see_the_others(h, dtype, centered, device):
    x, dy = (torch.randn(6, 2, h).mul(2).add(0.5).to(device, dtype) for _ in range(2))
    gamma, beta = torch.randn(h).to(device, dtype), torch.randn(h).to(device, dtype) if centered else None
    y, mean, rstd = norm.normalised(x, gamma, beta, EPS, centered)
    dx = norm.input_gradient(dy, x, gamma, mean, rstd)
    for rows in (slice(0, 1), slice(1, 4)):
        y_, mean_, rstd_ = norm.normalised(x[rows], gamma, beta, EPS, centered)
        assert_same_bits(y_, y[rows])
        assert_same_bits(rstd_, rstd[rows])
        assert_same_bits(norm.input_gradient(dy[rows], x[rows], gamma, mean_, rstd_), dx[rows])

    cpu = [t.cpu().double() if t is not None else None for t in (x, dy, gamma, beta)]
    X = cpu[0].requires_grad_()
    middle = X.mean(-1, keepdim=True) if centered else 0
    right = (X - middle) / ((X - middle).square().mean(-1, keepdim=True) + EPS).sqrt() * cpu[2]
    right = right + cpu[3] if centered else right
    right.backward(cpu[1])
    # A dozen roundings and two sums of depth log2 h, relative to the row's largest term.
    few = (12 + 2 * math.log2(h)) * 2.0**-24
    largest = (cpu[1] * cpu[2]).abs().amax(-1, keepdim=True) * rstd.cpu().double() * 8
    assert_close(y, right.detach(), few * right.detach().abs().amax(-1, keepdim=True))
    assert_close(dx, X.grad, few * largest)


@pytest.mark.parametrize("centered", (False, True), ids=("rmsnorm", "layernorm"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gamma_gradient_multiplies_as_it_sums(dtype, centered, device):
    x, dy = torch.randn(70, 2, 40).to(device, dtype), torch.randn(70, 2, 40).to(device, dtype)
    _, mean, rstd = norm.normalised(x, torch.ones(40, device=device), None, EPS, centered)
    summed = tree_of_gamma_gradients(dy, x, mean, rstd, 0, 8, (1,))
    shifted = x.cpu().float() - mean.cpu() if centered else x.cpu().float()
    assert_same_bits(summed, leaves_by_pairs(dy.cpu().float() * (shifted * rstd.cpu()), 8))
    exact = exact_sum(
        dy.cpu().float() * x_hat(x.cpu(), *exact_norm.normalised(x.cpu(), torch.ones(40), None, EPS, centered)[1:]),
        (0, 1),
    )
    assert_close(summed, exact, 2.0**-18 * 140)
    dy_heads = dy.unflatten(2, (8, 5))
    of_heads = x.unflatten(2, (8, 5))
    _, mean, rstd = norm.normalised(of_heads, torch.ones(5, device=device), None, EPS, centered)
    shifted = of_heads.cpu().float() - mean.cpu() if centered else of_heads.cpu().float()
    terms = dy_heads.cpu().float() * (shifted * rstd.cpu())
    assert_same_bits(
        tree_of_gamma_gradients(dy_heads, of_heads, mean, rstd, 2, 4, (0, 1)),
        tree_sum(by_pairs(part.reshape(-1, 5), 0) for part in terms.split(2, 2)),
    )


def test_zeros_are_positive_and_specials_come_through(device):
    x = torch.full((4, 40), -0.0)
    x[1, 7], x[2, 3] = math.inf, math.nan
    sums = row_sums(x.to(device), [1]).cpu()
    assert not sums[0].signbit() and sums[1] == math.inf and sums[2].isnan() and not sums[3].signbit()
    columns = row_sums(x.t().contiguous().to(device), [0]).cpu()
    assert not columns[0].signbit() and columns[1] == math.inf and columns[2].isnan()

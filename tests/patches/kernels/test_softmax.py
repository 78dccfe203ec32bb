"""Softmax, cross-entropy and embedding on a GPU: right, and the same bits however the vocabulary is spread.

Exponentials are polynomials, so results are held to float64 within a bound, and to each other bit by bit.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.order.exact.sums import exact_sum
from patches.order.kernels import embedding
from patches.order.kernels.cross_entropy import CHUNK, exponentials, joined, logits_gradient, losses
from patches.order.kernels.embedding import embedding_gradient
from patches.order.kernels.softmaxes import SHORT, softmax, softmax_gradient
from patches.order.polynomials import ULPS
from patches.order.tree import tree_sum
from tests.patches.kernels.by_pairs import DTYPES, assert_close, by_pairs
from tests.support.bits import assert_same_bits

ULP = 2.0**-24
LENGTHS = (1, 7, 640, SHORT + 1, 2 * SHORT)


def errors(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative errors of exp(z - max) and of its sum over a row, in ULP; float64.

    A rounding of d counts |d| times; then exp itself, and a multiplication or two.
    """
    d = (z.cpu().double().amax(1, keepdim=True) - z.cpu().double()).nan_to_num(0.0, 0.0)
    of_terms = d + ULPS + 2
    return of_terms, (torch.softmax(-d, 1) * of_terms).sum(1, keepdim=True) + math.log2(z.shape[1])


@pytest.mark.parametrize("log", (False, True), ids=("softmax", "log_softmax"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_softmax_is_right_and_a_row_does_not_see_the_others(n, dtype, log, device):
    x = torch.randn(4, n).mul(3).to(device, dtype)
    x[1, n // 2 + 1 :] = -math.inf
    x[2] = -math.inf
    y = softmax(x, 1, dtype, log)
    right = (torch.log_softmax if log else torch.softmax)(x.cpu().double(), 1)
    of_terms, of_sum = errors(x)
    assert_close(y, right, ULP * (2 * right.abs() + of_sum + 8 if log else right * (of_terms + of_sum)))
    assert_same_bits(softmax(x[1:2], 1, dtype, log), y[1:2])
    assert_same_bits(softmax(x.t().contiguous(), 0, dtype, log).t(), y)
    assert_same_bits(softmax(torch.cat([x[:1, :1], x.flatten()[None]], 1)[0, 1:].view(4, n), 1, dtype, log), y)

    dy = torch.randn(4, n).to(device, dtype)
    dx = softmax_gradient(dy, y, 1, dtype, log)
    dy64, y64 = dy.cpu().double(), y.cpu().double()
    terms, weights = (dy64, y64.exp()) if log else (dy64 * y64, y64)
    total = terms.sum(1, keepdim=True)
    sizes = terms.abs() + weights * terms.abs().sum(1, keepdim=True)
    bound = ULP * (
        (6 + math.log2(n)) * sizes + weights * total.abs() * (3 * y64.abs().nan_to_num(posinf=0) + 8 if log else 1)
    )
    assert_close(dx, terms - weights * total, bound)
    assert_same_bits(softmax_gradient(dy[:1], y[:1], 1, dtype, log), dx[:1])


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("n", (50, SHORT + 1))
def test_softmax_of_nan_or_infinity_is_nan(n, bad, device):
    x = torch.randn(2, n)
    x[0, 7] = bad
    y = softmax(x.to(device), 1, torch.float32).cpu()
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("share", (13, 2 * CHUNK + 40))
def test_sum_of_exponentials_is_the_same_tree_on_every_rank(share, device):
    z = torch.randn(3, 8 * share).mul(4).to(device)
    z[0, : 3 * share] = -math.inf  # leaves of nothing else
    z[1, 5 * share] = 90.0  # all other leaves vanish beside it
    z[2] = -math.inf
    top, total = joined(*exponentials(z, 8))
    right = (z.cpu().double() - z.cpu().double().amax(1, keepdim=True)).exp().sum(1, keepdim=True)
    assert_same_bits(top, z.amax(1))
    picked = z[:, 7]
    exact = right.squeeze(1).log() - (picked.cpu().double() - z.cpu().double().amax(1))
    assert_close(
        losses(top, total, picked)[:2], exact[:2], 2 * ULP * (errors(z)[1].squeeze(1)[:2] + 8 + exact[:2].abs())
    )
    assert_close(total, right.squeeze(1), (2 * ULP * errors(z)[1] * right).squeeze(1))
    for ranks in (2, 8):
        roots = [joined(*exponentials(part, 8 // ranks), top)[1] for part in z.chunk(ranks, 1)]
        assert_same_bits(tree_sum(roots)[:2], total[:2])
        assert tree_sum(roots)[2].isnan() and total[2].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_gradient_is_right_and_the_same_on_every_rank(dtype, device):
    share = CHUNK + 8
    z = torch.randn(3, 2 * share).to(device, dtype)
    target, dloss = torch.tensor([5, share, 2 * share - 1]).to(device), torch.randn(3).to(device)
    top, total = joined(*exponentials(z, 2))
    dz = logits_gradient(z, target, top, total, dloss)
    right = torch.softmax(z.cpu().double(), 1)
    weights = right * dloss.cpu().double().abs()[:, None]
    right[torch.arange(3), target.cpu()] -= 1
    right *= dloss.cpu().double()[:, None]
    of_terms, of_sum = errors(z)
    assert_close(dz, right, ULP * (weights * (of_terms + 2 * of_sum) + 4 * dloss.cpu().abs()[:, None]))
    for rank in range(2):
        own = logits_gradient(z.chunk(2, 1)[rank], target - rank * share, top, total, dloss)
        assert_same_bits(own, dz.chunk(2, 1)[rank])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", (4, 64))
def test_embedding_row_sums_its_own_tokens_in_order(chunk, dtype, device, monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK", chunk)
    rows, tokens = 6, max(5 * chunk, 100)
    ids = torch.randint(0, rows, (tokens,))
    ids[ids == 4] = 1  # a row without tokens, and one of several chunks; of more than 4 x 4, where 4 tokens are one
    dy = torch.randn(tokens, 20)
    whole = embedding_gradient(dy.to(device, dtype), ids.to(device), rows, dtype)
    for row in range(rows):
        own = dy.to(dtype)[ids == row]
        sums = [by_pairs(part, 0) for part in own.split(chunk)]
        total = torch.zeros(20)
        for first in range(0, len(sums), chunk):
            total = total + by_pairs(torch.stack(sums[first : first + chunk]), 0)
        assert_same_bits(whole[row], total.to(dtype))
        assert_close(whole[row], exact_sum(own, 0), ULP * (len(sums) / chunk + 14) * exact_sum(own.abs(), 0))
    halves = [embedding_gradient(dy.to(device, dtype), ids.to(device) - 3 * rank, 3, dtype) for rank in range(2)]
    assert_same_bits(torch.cat(halves), whole)
    mine = ids < 3  # what other ranks' tokens are, and whether there are any
    assert_same_bits(embedding_gradient(dy[mine].to(device, dtype), ids[mine].to(device), 3, dtype), halves[0])

"""Kernels that compute each head by itself are told from those that don't, by their bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from patches.order.head_invariance import find_head_dependence
from tests.support.head_by_head import Spoilt, attention

HEADS = 8
RESULTS = list(enumerate(("the output", "dq", "dk", "dv")))


def asked(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], **options: bool) -> str | None:
    like = torch.empty(5, 2, HEADS // 4, 4)  # what a rank of TP=4 holds
    return find_head_dependence(kernel, like, like, like, HEADS, 2, **options)


def test_attention_head_by_head_depends_on_nothing():
    assert asked(attention) is None


@pytest.mark.parametrize(("which", "name"), RESULTS)
def test_what_follows_the_number_of_heads_is_found(which, name):
    found = asked(lambda q, k, v: Spoilt.apply(q, k, v, which, int(q.shape[2] == HEADS // 4)))
    assert found == f"{name} of a head differs when 2 heads are computed instead of 8"


@pytest.mark.parametrize(("which", "name"), RESULTS)
def test_what_differs_from_call_to_call_is_found(which, name):
    calls = itertools.count()
    found = asked(lambda q, k, v: Spoilt.apply(q, k, v, which, int(next(calls) == 1)))
    assert found == f"{name} differs from one call to the next"


def test_a_zero_of_another_sign_is_found():
    found = asked(lambda q, k, v: attention(q, k, v) * 0.0 * (1 if q.shape[2] == HEADS else -1), backward=False)
    assert found is not None and "the output" in found


def test_gradients_are_left_out_where_there_are_none():
    assert asked(lambda q, k, v: Spoilt.apply(q, k, v, 1, int(q.shape[2] < HEADS)), backward=False) is None


def test_a_question_inside_a_checkpointed_layer_leaves_its_graph_alone():
    calls = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape[2])
        return attention(q, k, v)

    def layer(x: Tensor) -> Tensor:
        assert asked(counted) is None
        return attention(x, x, x).sin()

    x = torch.randn(5, 2, 2, 4, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    again = x.detach().clone().requires_grad_()
    attention(again, again, again).sin().sum().backward()
    assert torch.equal(x.grad, again.grad)
    assert calls == 2 * [8, 8, 4, 4, 2, 2, 2, 2, *[1] * 8]  # forward and recomputation, nothing more

"""A router: what a token's experts and weights depend on, and what of a sequence stays within a capacity."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patches.ops.routing import Choice, chosen_experts, top_k, within_capacity

# Few values, so that many are equal.
SCORES = st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=8, max_size=8), min_size=1, max_size=9)
CHOICES = (
    Choice(2),
    Choice(8),
    Choice(2, pre_softmax=True),
    Choice(4, "sigmoid", groups=4, group_topk=2, scaling=2.5),
)


@settings(deadline=None, max_examples=60)
@given(SCORES, st.integers(1, 8))
def test_of_equal_scores_the_first_are_taken(scores, k):
    for row in scores:
        best = sorted(range(8), key=lambda expert: (-row[expert], expert))[:k]
        assert top_k(torch.tensor(row), k)[1].tolist() == best


@settings(deadline=None, max_examples=60)
@given(SCORES, st.sampled_from(CHOICES), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_tokens_experts_depend_on_its_own_scores_alone(scores, choice, dtype):
    logits = torch.tensor(scores, dtype=dtype)
    weights, chosen = chosen_experts(logits, choice)
    assert chosen.sum(1).eq(choice.k).all() and not weights[~chosen].any()
    for number, row in enumerate(logits):
        own_weights, own_chosen = chosen_experts(row.unsqueeze(0), choice)
        assert torch.equal(chosen[number], own_chosen[0])
        # Under the patches these are the same bits; here, torch's own softmax may have a tail.
        torch.testing.assert_close(weights[number], own_weights[0])


def test_the_largest_weights_of_a_sequence_stay_and_of_equal_ones_the_first():
    weights = torch.tensor([0.5, 0.9, 0.5, 0.5, 0.0, 0.9]).unsqueeze(1)  # two sequences of three tokens, one expert
    chosen = torch.tensor([True, True, True, True, False, True]).unsqueeze(1)
    stay = within_capacity(weights, chosen, 2, 2, False, None).flatten().tolist()
    assert stay == [True, True, True, False, False, True]
    stay = within_capacity(weights, chosen, 2, 1, False, None).flatten().tolist()
    assert stay == [True, True, False, False, False, False]
    assert within_capacity(weights, chosen, 2, 1, True, None).flatten().tolist() == [True, True, *[False] * 4]

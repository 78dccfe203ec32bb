"""Tokens come to their experts and back; a token's rows are added in the order of its experts, wherever these are."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from patches.ops.dispatch import route, to_experts, to_tokens, weights_to_experts
from tests.support.ranks import on_ranks

EXPERTS, SEQUENCES, LEAVES, TOKENS = 4, 2, 2, 8
# What experts make of a row of ones. Added in another order than theirs, in float32, some of these would give 1.
FACTORS = (2.0**26, 1.0, -(2.0**26), 3.0)


def there_and_back(ep: int, etp: int, chosen_of_ranks: list[list[list[int]]]) -> tuple[list[float], list[float], int]:
    """Each token's sum and gradient on this rank, and how many rows its experts got."""
    parallel_state.initialize_model_parallel(1, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
    rank = torch.distributed.get_rank()
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    for token, experts in enumerate(chosen_of_ranks[rank]):
        chosen[token, experts] = True
    groups = parallel_state.get_expert_model_parallel_group(), parallel_state.get_expert_tensor_parallel_group()
    way = route(chosen, SEQUENCES, LEAVES, 3, *groups)
    first = parallel_state.get_expert_model_parallel_rank() * (EXPERTS // ep)
    factors = [FACTORS[first + number] for number, rows in enumerate(way.rows_of_experts) for _ in range(rows)]
    x = torch.ones(TOKENS, 1, requires_grad=True)
    weights = weights_to_experts(torch.tensor(FACTORS).expand(TOKENS, -1), way)
    assert weights.tolist() == factors
    y = to_tokens(to_experts(x, way) * weights.unsqueeze(1), way)
    y.sum().backward()
    assert x.grad is not None
    return y.flatten().tolist(), x.grad.flatten().tolist(), len(factors)


def expected(experts: list[int]) -> float:
    total = torch.zeros(())
    for expert in sorted(experts):
        total = total + FACTORS[expert]
    return total.item()


def test_rows_are_added_in_the_order_of_experts():
    chosen = [[[token % 4, (token + 1) % 4, (token + 2 + rank) % 4] for token in range(TOKENS)] for rank in range(4)]
    chosen[1] = [[1]] * TOKENS  # whatever rank has the other experts gets nothing from here
    for ep, etp in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2)):
        for rank, (sums, gradients, _) in enumerate(on_ranks(4, there_and_back, ep, etp, chosen)):
            assert sums == gradients == [expected([*set(experts)]) for experts in chosen[rank]]
    assert expected([0, 1, 2]) == 0.0 != expected([0, 2]) + FACTORS[1]


def test_a_rank_without_rows_takes_part():
    found = on_ranks(2, there_and_back, 2, 1, [[[0]] * TOKENS, [[0, 1]] * TOKENS])
    assert [rows for _, _, rows in found] == [3 * TOKENS, 0]

"""The gradient norm on a GPU: exact, so that no split into tensors and ranks can change a bit."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.order import backend, kernels
from patches.order.grad_norm import gradient_norm
from patches.order.kernels.squares import TILE, root, squares
from tests.patches.kernels.by_pairs import DTYPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)  # zeros and subnormals as well


def exact_root(values: list[float]) -> float:
    total = sum((Fraction(value) ** 2 for value in values), Fraction(0)) * 2**298
    return math.sqrt(math.ldexp(float(int(total)), -298))


@settings(max_examples=60, deadline=None)
@given(st.lists(ANY_FLOAT, max_size=60), st.lists(st.integers(0, 60), max_size=6), st.integers(0, 6))
def test_no_split_into_tensors_and_ranks_changes_a_bit(values, places, ranks):
    x = torch.tensor(values, dtype=torch.float32, device=DEVICE)
    edges = sorted({0, len(values), *(p for p in places if p < len(values))})
    parts = [x[lo:hi] for lo, hi in pairwise(edges)]
    split = sum((squares(parts[r :: ranks + 1], DEVICE) for r in range(ranks + 1)), squares([], DEVICE))
    norms = [root(squares([x], DEVICE)), root(split)]
    if any(map(math.isnan, values)):
        assert all(map(math.isnan, norms))
    else:
        right = math.inf if any(map(math.isinf, values)) else exact_root(values)
        assert norms == [right, right]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_is_exact_over_tiles_and_exponents(dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2 * TILE + 77, generator=g) * 2.0 ** torch.randint(-60, 60, (2 * TILE + 77,), generator=g)
    x = x.to(dtype)
    x = x[x.isfinite()]
    halves = [x[:1000].view(10, 100).t(), x[1000:]]
    assert root(squares([t.to(DEVICE) for t in halves], DEVICE)) == exact_root(x.double().tolist())


def test_largest_squares_have_room():
    x = torch.full((3 * TILE,), torch.finfo(torch.float32).max, device=DEVICE)
    assert root(squares([x], DEVICE)) == exact_root(x.double().tolist())


def test_gradient_norm_takes_it(monkeypatch):
    monkeypatch.setitem(backend._BACKENDS, "cpu", lambda: kernels)
    x, y = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.tensor([1e-30, 3.0]).bfloat16()
    right = exact_root([*x.double().tolist(), *y.double().tolist()])
    assert gradient_norm([x.to(DEVICE), y.to(DEVICE)], [], DEVICE) == right
    assert gradient_norm([], [], DEVICE) == 0
    with pytest.raises(TypeError, match="not torch.float64"):
        gradient_norm([x.double().to(DEVICE)], [], DEVICE)

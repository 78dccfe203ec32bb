"""Operands of products and sums, of the kinds that have broken summation schemes before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "wide", "one-hot", "subnormal", "huge-small", "zero-rows", "ones")
# And those that bounds are of little use for: float32 ties, sums of nothing but what cancels, numbers that are none.
HARD = (*KINDS, "ties", "cancelling", "sparse", "special", "negative zeros", "largest")


def cases(kinds: Sequence[str], k: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, Any]]:
    """Of products [m, k] @ [k, n]; `operands` makes the two."""
    size, kind = st.integers(1, 40), st.sampled_from(kinds)
    dtype, seed = st.sampled_from(DTYPES), st.integers(0, 1000)
    return st.fixed_dictionaries(
        {"m": size, "n": size, "k": k, "dtype": dtype, "a_kind": kind, "b_kind": kind, "seed": seed}
    )


def operands(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    a = values(case["a_kind"], (case["m"], case["k"] + 1), case["dtype"], case["seed"])[:, : case["k"]]
    b = values(case["b_kind"], (case["n"], case["k"] + 1), case["dtype"], case["seed"] + 1)[:, : case["k"]]
    return a, b.t()


def values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Operands that have broken summation schemes before."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if kind == "wide":
        x = x * torch.exp2(torch.randint(-30, 30, shape, generator=g).float())
    elif kind == "one-hot":  # a row of dlogits: one value of 1 among tiny ones
        x = x * 2.0**-20
        x[..., 0] = 1.0
    elif kind == "subnormal":
        x = x * torch.finfo(dtype).tiny * 0.1
    elif kind == "huge-small":
        x = torch.where(torch.rand(shape, generator=g) < 0.5, x * 1e4, x * 1e-4)
    elif kind == "zero-rows":
        x[torch.rand(shape[:-1], generator=g) < 0.5] = 0.0
    elif kind == "ones":
        x = torch.ones(shape)
    elif kind == "ties":
        x = torch.exp2(torch.randint(-13, 1, shape, generator=g).float()) * x.sign()
    elif kind == "cancelling":
        x = torch.cat([x, -x], -1)[..., : shape[-1]]
    elif kind == "sparse":
        x = x * (torch.rand(shape, generator=g) < 0.1)
    elif kind == "special":
        odd = torch.tensor([math.inf, -math.inf, math.nan])[torch.randint(0, 3, shape, generator=g)]
        x = torch.where(torch.rand(shape, generator=g) < 0.01, odd, x)
    elif kind == "negative zeros":
        x = torch.where(torch.rand(shape, generator=g) < 0.5, x, -0.0)
    elif kind == "largest":
        x = x.sign() * torch.finfo(dtype).max
    limit = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-limit, limit)).to(dtype)


def exact_leaves(m: int, k: int, n: int, leaves: int, pieces: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[m, k] and [k, n] whose leaves' sums are exact in float32 in any order, but whose roots must be rounded.

    They are whole multiples, below 2^24, of a power of two that differs from leaf to leaf.
    """
    assert 127 * 127 * (k // leaves + 1) < 1 << 24
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, shape, generator=g).double() for shape in ((m, k), (k, n)))
    leaf = torch.arange(k) % (k // pieces) * leaves // (k // pieces)
    return (a * torch.exp2(-(leaf * 5 % 13).double())).to(dtype), b.to(dtype)

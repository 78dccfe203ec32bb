"""exp2, exp and log of our own: within their bound of float64, and exact where a sum relies on it."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

import triton
import triton.language as tl

from patches.order.kernels.exponentials import exp, exp2, log
from patches.order.kernels.pairs import LAUNCH, on
from patches.order.polynomials import ULPS

BLOCK = 1 << 18


@triton.jit
def _apply(x, y, size, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < size, other=1.0)
    if WHICH == "exp2":
        values = exp2(values)
    elif WHICH == "exp":
        values = exp(values)
    else:
        values = log(values)
    tl.store(y + at, values, mask=at < size)


def applied(which: str, x: torch.Tensor, device: torch.device) -> torch.Tensor:
    x = x.to(device)
    y = torch.empty_like(x)
    block = BLOCK if x.device.type == "cpu" else 1024
    with on(x):
        _apply[(-(-x.numel() // block),)](x, y, x.numel(), WHICH=which, BLOCK=block, **LAUNCH)
    return y.cpu()


def every_exponent(low: int, high: int) -> torch.Tensor:
    """2^14 mantissas of every exponent."""
    mantissas = torch.arange(0, 1 << 23, 1 << 9, dtype=torch.int32)
    return torch.cat([(mantissas | (127 + e << 23)).view(torch.float32) for e in range(low, high)])


@pytest.mark.parametrize("which", ("exp2", "exp", "log"))
def test_function_is_within_its_bound(which, device):
    if which == "log":
        x = torch.cat([every_exponent(-20, 40), 1 + torch.arange(-(1 << 16), 1 << 16) * 2.0**-24])
    else:
        x = -every_exponent(-30, 7)
        x = torch.cat([x[x > (-126 if which == "exp2" else -87)], torch.linspace(-0.5, 0.5, 1 << 19)])
    right = {"exp2": torch.exp2, "exp": torch.exp, "log": torch.log}[which](x.double())
    error = (applied(which, x, device).double() - right).abs()
    assert (error <= ULPS * 2.0**-24 * right.abs()).all(), float((error / right.abs()).nan_to_num().max() * 2**24)


def test_what_is_exact(device):
    whole = torch.arange(-126.0, 127.0)
    assert torch.equal(applied("exp2", whole, device), torch.exp2(whole))
    assert applied("exp", torch.zeros(1), device).item() == 1
    assert applied("log", torch.ones(1), device).item() == 0
    below = torch.tensor([-math.inf, -500.0, -127.0])
    assert applied("exp2", below, device).tolist() == applied("exp", below, device).tolist() == [0.0] * 3
    for which in ("exp2", "exp", "log"):
        assert applied(which, torch.tensor([math.nan]), device).isnan().all()
    assert applied("log", torch.tensor([math.inf]), device).item() == math.inf

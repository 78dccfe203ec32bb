"""Operands of products, how far from right they may be, and plans made anew: what tests of `kernels.gemm` share."""

from __future__ import annotations

import torch

from patches.order.exact.products import exact_product, tree_of_products
from patches.order.kernels import plans

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("ab", "abᵀ", "aᵀb", "aᵀbᵀ")  # dgrad, forward, wgrad, neither operand as the tensor cores like it


def operands(M, N, K, device, dtype=torch.bfloat16, layout="abᵀ", batch=()):
    """Random [*batch, M, K] and [*batch, K, N]; ᵀ says that K is, or is not, the dimension that lies side by side."""
    a = torch.randn(*batch, M, K) if "aᵀ" not in layout else torch.randn(*batch, K, M).mT
    b = torch.randn(*batch, N, K).mT if "bᵀ" in layout else torch.randn(*batch, K, N)
    return a.to(device, dtype), b.to(device, dtype)


def assert_right(y, a, b, leaves=1, pieces=1):
    """float32 accumulation in any order: (K + leaves)·2⁻²⁴·Σ|ab|; twice that, as tensor cores may cut, not round."""
    exact = tree_of_products(a.cpu(), b.cpu(), leaves, pieces).double()
    sizes = exact_product(a.cpu().abs(), b.cpu().abs()).double()
    bound = (a.shape[-1] + leaves) * 2.0**-23 * sizes
    assert ((y.cpu().double() - exact).abs() <= bound).all()


def replan(monkeypatch, **changes):
    """From now on plans are made with these in place of functions and numbers of `plans`."""
    for name, change in changes.items():
        monkeypatch.setattr(plans, name, change)
    plans.plan.cache_clear()

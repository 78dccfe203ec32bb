"""What is tried on a device before its first product: that bits depend on operands alone, and whose bits they are."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from patches.contract import UnsupportedError
from patches.order.kernels.gemm import product
from patches.order.kernels.golden import class_of
from patches.order.kernels.plans import family
from patches.order.tree import cuts, tree_sum

__all__ = ["check"]


def check(device: torch.device) -> None:
    """Compare, on this very `device`, bits that must not depend on tiles, loads, or what else is in a call.

    Raises:
        UnsupportedError: they do, or it is no GPU that products are made for.
    """
    family(device)
    class_of(device)
    generator = torch.Generator("cpu").manual_seed(0)
    a_MK, b_NK = (
        torch.randn(size, 1024, generator=generator, device="cpu").to(device, torch.bfloat16) for size in (200, 328)
    )
    whole = product(a_MK, b_NK.T, leaves=8)
    for what, count in (("a leaf alone", 8), ("half of the leaves", 2)):
        parts = cuts(1024, count)
        roots = [product(a_MK[:, lo:hi], b_NK[:, lo:hi].T, leaves=8 // count) for lo, hi in parts]
        _same_bits(what, tree_sum(roots), whole)
    _same_bits("a row alone", product(a_MK[7:8], b_NK.T, leaves=8), whole[7:8])
    unaligned = torch.cat([a_MK[:, :1], a_MK], 1)[:, 1:]  # out of TMA's reach
    _same_bits("loads by pointers", product(unaligned, b_NK.T, leaves=8), whole)


def _same_bits(what: str, found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found.view(torch.int32), expected.view(torch.int32)):
        raise UnsupportedError(
            f"products on this GPU do not keep the contract: {what} gives other bits (sm_{family(found.device)}, "
            f"Triton {triton.__version__}). Please report it, with the output of `make gpu`"
        )

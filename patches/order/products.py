"""Products in the contract's order, by the device that the operands lie on.

CPU    exact leaves (`order.exact`): the bits are those of any CPU, BLAS and thread count
CUDA   leaves of one fixed tile and k order on tensor cores (`order.gemm_gpu`): those of one architecture family
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from patches.contract import UnsupportedError
from patches.order.exact.products import exact_product, rounded
from patches.order.kernels import provenance
from patches.order.tree import tree_of_products

__all__ = ["add_product", "check", "describe", "keep_to", "product", "tree_product"]

_kept: str | None = None


def keep_to(device: str | None) -> None:
    """Refuse products on any other kind of device from now on: "cpu", "cuda", or None for no such promise.

    Raises:
        UnsupportedError: there is no product on `device`.
    """
    global _kept
    if device == "cuda":
        _gemm()
    _kept = device


def describe(device: str) -> dict[str, Any]:
    """What the bits of products and other sums on `device` depend on besides their operands, for the manifest."""
    facts: dict[str, Any] = (
        {**_gemm().contract(), "sums": provenance.contract()} if device == "cuda" else {"leaf": "exact"}
    )
    return facts


@lru_cache
def check(device: torch.device) -> None:
    """Try on this very `device`, once, that products keep the contract; raise `UnsupportedError` if they don't."""
    if device.type == "cuda":
        _gemm().check(device)


def product(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One leaf, a·b, rounded once to `dtype`: [..., M, N].

    Args:
        a_MK: [..., M, K], float32, bfloat16 or float16, any strides.
        b_KN: [..., K, N], same dtype and leading dimensions.

    Raises:
        UnsupportedError: on another kind of device than training was patched for.
    """
    return tree_product(a_MK, b_KN, 1, dtype=dtype)


def tree_product(
    a_TK: Tensor, b_KN: Tensor, leaves: int, pieces: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The tree over `leaves` products, rounded once to `dtype`; leaf j takes its share of each of K's `pieces`.

    Args:
        a_TK: [T, K]; with pieces=2, K holds [gate | up] and leaf j is gate[j] ∪ up[j].
        b_KN: [K, N], cut likewise.
    """
    if _on_gpu(a_TK, b_KN):
        root: Tensor = _gemm().product(a_TK, b_KN, leaves, pieces, dtype)
        return root
    if leaves == pieces == 1:
        return exact_product(a_TK, b_KN, dtype)
    return rounded(tree_of_products(a_TK, b_KN, leaves, pieces), dtype)


def add_product(into: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """into += a·b, one addition in float32 per element."""
    if into.dtype == torch.float32 and _on_gpu(into, a_MK, b_KN):
        _gemm().product(a_MK, b_KN, into=into)
    else:
        into.add_(product(a_MK, b_KN))


def _on_gpu(*operands: Tensor) -> bool:
    kinds = {x.device.type for x in operands}
    if len(kinds) > 1:
        raise ValueError(f"operands of one product lie on different devices: {', '.join(sorted(kinds))}")
    (kind,) = kinds
    if _kept not in (None, kind):
        way_out = ', or set CUDA_VISIBLE_DEVICES="" to train on CPU' if kind == "cpu" else ""
        raise UnsupportedError(
            f"a product on {kind} in a run that was patched for {_kept}: move its operands to {_kept}{way_out}"
        )
    check(operands[0].device)
    return kind == "cuda"


@lru_cache
def _gemm() -> ModuleType:
    try:
        return import_module("patches.order.kernels.gemm")
    except ImportError as error:
        raise UnsupportedError(
            f"products on a GPU need Triton ({error}): install the version that torch {torch.__version__} asks for"
        ) from error

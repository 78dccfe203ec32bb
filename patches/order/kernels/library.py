"""Kernels that may stand in for `gemm_kernel`, wherever they were seen to give its very bits. Off unless asked for.

    PATCHES_CUBLAS=1   products of one leaf by cuBLAS
    PATCHES_GLUON=1    trees of 2 to 8 leaves by the kernel of `specialised`

A tensor core's bits follow from groups of 16 along K alone (`tensor_core`), so a kernel that goes through a leaf in
order, without splitting it, has no other choice. Whether it does is seen, not trusted: the first product of operands
laid out in a new way is computed by both, ours is what is returned, and only if no bit differs does the other get the
next ones. What is not seen: whether cuBLAS's heuristic picks another algorithm for the same layout later (torch asks it
by layout and alignment, which is what is remembered here), and a race that the first products did not lose. An H100's
cuBLAS gave our bits at every shape that was tried and is 3 % faster in the median: too little for a default. Trees by
`specialised` are to be measured first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patches.order.kernels.pairs import INTERPRETED

__all__ = ["CUBLAS", "GLUON", "Library", "cublas", "specialised"]

CUBLAS, GLUON = "PATCHES_CUBLAS", "PATCHES_GLUON"

# a, b, what else the caller hands over, and float32 [M, N] that the product is added into, or None.
Multiply = Callable[..., Tensor]


class Library:
    """Another kernel's products, and for which layouts they were seen to be ours."""

    def __init__(self, multiply: Multiply, times: int = 1) -> None:
        """`times` that it has to give our bits the first time, where a race could spoil them."""
        self._multiply, self._times = multiply, times
        self._same: dict[Hashable, bool] = {}

    def product(
        self, layout: Hashable, ours: Callable[[], Tensor], into: Tensor | None, a: Tensor, b: Tensor, *how: Any
    ) -> Tensor:
        """a·b, or added into `into`; `ours` does the same."""
        same = self._same.get(layout)
        if same:
            return self._multiply(a, b, *how, into)
        if same is None:
            copies = [None if into is None else into.clone() for _ in range(self._times)]
            theirs = [self._multiply(a, b, *how, copy) for copy in copies]
            result = ours()
            self._same[layout] = all(_same_bits(one, result) for one in theirs)
            return result
        return ours()


def cublas() -> Library | None:
    """cuBLAS without split K, where the environment asks for it and there is a GPU.

    Its kernels are taken as they are now, so it is asked for before ATen's are overridden.
    """
    if not _asked_for(CUBLAS) or not torch.cuda.is_available():
        return None
    matmul: Any = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)  # nor split K
    torch.backends.cuda.preferred_blas_library("cublaslt")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    mm, addmm = (
        partial(torch.library.get_kernel(f"aten::{name}", "CUDA").call_boxed, keys)
        for name in ("mm.dtype", "addmm.dtype_out")
    )

    def multiply(a: Tensor, b: Tensor, dtype: torch.dtype, into: Tensor | None) -> Tensor:
        y: Tensor = mm(a, b, dtype) if into is None else addmm(into, a, b, torch.float32, out=into)
        return y

    return Library(multiply)


def specialised() -> tuple[Library, Any] | None:
    """The kernel of `specialised` and that module, where the environment asks for it and kernels are compiled.

    Imported here alone: other versions of Triton may have another Gluon, or none.
    """
    if not _asked_for(GLUON) or INTERPRETED:
        return None
    from patches.order.kernels import specialised as module

    return Library(module.product, times=3), module


def _asked_for(switch: str) -> bool:
    return os.environ.get(switch, "0") not in ("", "0")


def _same_bits(x: Tensor, y: Tensor) -> bool:
    whole = torch.int32 if y.dtype == torch.float32 else torch.int16
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.view(whole), y.view(whole))

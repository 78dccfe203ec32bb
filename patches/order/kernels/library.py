"""cuBLAS for products of one leaf, wherever it was seen to give our kernel's very bits. Off unless PATCHES_CUBLAS=1.

A tensor core's bits follow from groups of 16 along K alone (`tensor_core`), so a library that goes through K in order,
without splitting it, has no other choice. Whether it does is seen, not trusted: the first product of operands laid out
in a new way is computed by both, ours is what is returned, and only if no bit differs does cuBLAS get the next ones.
What is not seen is whether its heuristic picks another algorithm for the same layout later: torch asks it by layout and
alignment, which is what is remembered here. To be measured on a GPU before it is anybody's default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["SWITCH", "Library", "cublas"]

SWITCH = "PATCHES_CUBLAS"

# [M, K]·[K, N] in a dtype, and float32 [M, N] += of them
Multiply = Callable[[Tensor, Tensor, torch.dtype], Tensor]
Add = Callable[[Tensor, Tensor, Tensor], Tensor]


class Library:
    """Somebody else's products, and for which layouts they were seen to be ours."""

    def __init__(self, multiply: Multiply, add: Add) -> None:
        self._multiply, self._add = multiply, add
        self._same: dict[Hashable, bool] = {}

    def product(
        self,
        layout: Hashable,
        ours: Callable[[], Tensor],
        a: Tensor,
        b: Tensor,
        dtype: torch.dtype,
        into: Tensor | None,
    ) -> Tensor:
        """a·b in `dtype`, or added into `into`; `ours` does the same."""
        same = self._same.get(layout)
        if same:
            return self._multiply(a, b, dtype) if into is None else self._add(into, a, b)
        if same is None:
            theirs = self._multiply(a, b, dtype) if into is None else self._add(into.clone(), a, b)
            result = ours()
            self._same[layout] = _same_bits(theirs, result)
            return result
        return ours()


def cublas() -> Library | None:
    """cuBLAS without split K, where the environment asks for it and there is a GPU.

    Its kernels are taken as they are now, so it is asked for before ATen's are overridden.
    """
    if os.environ.get(SWITCH, "0") in ("", "0") or not torch.cuda.is_available():
        return None
    matmul: Any = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)  # nor split K
    torch.backends.cuda.preferred_blas_library("cublaslt")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    mm, addmm = (
        partial(torch.library.get_kernel(f"aten::{name}", "CUDA").call_boxed, keys)
        for name in ("mm.dtype", "addmm.dtype_out")
    )

    def add(into: Tensor, a: Tensor, b: Tensor) -> Tensor:
        added: Tensor = addmm(into, a, b, torch.float32, out=into)
        return added

    return Library(mm, add)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    whole = torch.int32 if y.dtype == torch.float32 else torch.int16
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.view(whole), y.view(whole))

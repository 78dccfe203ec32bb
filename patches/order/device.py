"""Where a sum runs: ATen and exact arithmetic for tensors on a CPU, Triton kernels for those on a GPU."""

from __future__ import annotations

from torch import Tensor

__all__ = ["takes_kernels"]


def takes_kernels(x: Tensor) -> bool:
    """Whether sums over `x` go to the kernels of the `*_gpu` modules."""
    return x.is_cuda

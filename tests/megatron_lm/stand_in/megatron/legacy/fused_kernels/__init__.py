"""Builds kernels with a compiler that a machine without a GPU has not got."""

from __future__ import annotations

from typing import Any

from torch.utils import cpp_extension


def load(args: Any) -> None:
    assert cpp_extension.CUDA_HOME, "no nvcc"

"""megatron.core.transformer.dot_product_attention: a buffer that nothing reads.

Megatron hands `torch.baddbmm` a buffer of all scores with `beta=0`, and keeps it for the process's life: 1 GB at 4096
tokens and 32 heads. ATen's override does not look at it.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from patches.contract import Contract
from patches.registry import Patch, Undo

__all__ = ["PATCHES"]

MODULE = "megatron.core.transformer.dot_product_attention"


class _NoBuffer:
    """In place of Megatron's `GlobalMemoryBuffer`: every tensor is one element, seen in any shape."""

    def get_tensor(self, tensor_shape: Any, dtype: torch.dtype, name: str) -> Tensor:
        return torch.zeros(1, dtype=dtype, device=torch.cuda.current_device()).expand(tuple(tensor_shape))


class _ParallelState:
    """`megatron.core.parallel_state` for that module, without its buffer."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def get_global_memory_buffer(self) -> _NoBuffer:
        return _NoBuffer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _install(contract: Contract) -> Undo:
    module: Any = importlib.import_module(MODULE)
    original = module.parallel_state
    module.parallel_state = _ParallelState(original)

    def undo() -> None:
        module.parallel_state = original

    return undo


PATCHES = [
    Patch(
        "scores-buffer",
        f"{MODULE}:DotProductAttention.forward",
        "the scores that baddbmm does not add take the memory of all scores",
        _install,
    )
]

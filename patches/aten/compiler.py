"""torch.compile: Megatron's fused functions (`jit_fuser`: SwiGLU, GELU, bias and residual) run as they are written.

The compiler may contract a multiplication and an addition, and order a sum, by shape and device; no sum of it is in
the contract. Without a GPU `patches.cpu` has switched it off for good.
"""

from __future__ import annotations

import torch

from patches.contract import Contract
from patches.registry import Patch, Undo

__all__ = ["PATCHES", "without_compiler"]


def without_compiler() -> Undo:
    """Have functions that `torch.compile` made, before or from now on, run as they are, in every thread."""
    stance = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


def _install(contract: Contract) -> Undo:
    return without_compiler() if torch.cuda.is_available() else lambda: None


PATCHES = [
    Patch(
        "compiled-functions",
        "torch:compiler.set_stance",
        "the code that torch.compile makes of Megatron's fused functions is outside the contract",
        _install,
    )
]

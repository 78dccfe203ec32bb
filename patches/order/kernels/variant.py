"""What the static check compiles: a kernel variant as it is really launched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Variant"]


@dataclass(frozen=True)
class Variant:
    """A Triton kernel with everything that specialises it.

    Attributes:
        name: unique within its module; the row of the committed table.
        kernel: the `triton.jit` function.
        signature: argument name to Triton type, "constexpr" for those in `constexprs`.
        constexprs: argument name to value.
        attrs: argument index, as a tuple, to attributes: {(0,): [["tt.divisibility", 16]]}.
        expects: "mma" where the tensor cores must be used.
        families: the architectures it is launched on, by compute capability.
        fp_fusion: whether the compiler may contract a multiplication and an addition.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    attrs: dict[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    expects: str = ""
    families: tuple[int, ...] = (90, 100)
    fp_fusion: bool = True

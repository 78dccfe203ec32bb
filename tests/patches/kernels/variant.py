"""What the static check compiles: a kernel variant as it is really launched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


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
        maxnreg: registers that a thread may have, where the launch says so.
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
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the launch tells Triton."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        return options if self.fp_fusion else options | {"enable_fp_fusion": False}


def divisible(signature: dict[str, str], names: Iterable[str]) -> dict[tuple[int, ...], list[list[Any]]]:
    """`attrs` that say of these arguments, and of pointers, that they are multiples of 16."""
    wide = {*names, *(argument for argument, kind in signature.items() if kind[0] == "*")}
    return {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(signature) if argument in wide}


def variant(
    name: str, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], warps: int, multiples: str = ""
) -> Variant:
    """A variant of a kernel that sums by pairs.

    Args:
        types: argument to Triton type; arguments named neither here nor in `constexprs` are i32.
        multiples: arguments that are multiples of 16, separated by spaces, besides pointers.
    """
    signature = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constexprs, "constexpr")
    attrs = divisible(signature, multiples.split())
    return Variant(name, kernel, signature, constexprs, attrs, num_warps=warps, fp_fusion=False)

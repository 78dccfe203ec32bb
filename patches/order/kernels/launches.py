"""Launches of a product's kernel without asking Triton, from the second one on, which compiled kernel that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patches.order.kernels.pairs import on

__all__ = ["Launch"]


class Launch:
    """A launch of a kernel, but for addresses and what else is the call's own."""

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        programs: int,
        scratch: int,
        describe: tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]],
        numbers: tuple[int, ...],
        constants: dict[str, Any],
        options: dict[str, int],
    ) -> None:
        """Args: float32 elements of scratch; what makes arguments of operands; arguments after the call's own."""
        self._kernel, self._device, self._grid, self._scratch = kernel, device, (programs, 1, 1), scratch
        self._a, self._b = describe
        self._numbers, self._constants, self._options = numbers, constants, options
        self._compiled: Callable[..., None] | None = None

    def launch(self, a: Tensor, b: Tensor, out: Tensor, *more: Any) -> None:
        scratch = torch.empty(self._scratch, dtype=torch.float32, device=self._device) if self._scratch else None
        arguments = (self._a(a), self._b(b), out, scratch, *more, *self._numbers)
        with on(a):
            if self._compiled is not None:
                self._compiled(*arguments, *self._constants.values())
                return
            compiled = self._kernel[self._grid](*arguments, **self._constants, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            self._compiled = compiled[self._grid]

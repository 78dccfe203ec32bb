"""What modules return and are given, with a hook in the way of its tensors or of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["Watch", "replaced"]


def replaced(output: Any, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    """`output` with its floating-point tensors changed; the first is called "", the second "[1]" and so on."""
    numbers: Iterator[int] = iter(range(1 << 30))

    def inner(value: Any) -> Any:
        if isinstance(value, torch.nn.Parameter):
            return value
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            number = next(numbers)
            return change(f"[{number}]" if number else "", value)
        if type(value) in (tuple, list):
            changed = [inner(item) for item in value]
            same = all(new is old for new, old in zip(changed, value, strict=True))
            return value if same else type(value)(changed)
        if isinstance(value, dict):  # Hugging Face's outputs are dictionaries that also have attributes
            for key in list(value):
                value[key] = inner(value[key])
        return value

    return inner(output)


class Watch(torch.autograd.Function):
    """The identity; hands the gradient of a module's input to `record`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, record: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.record = record
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.record(gradient), None

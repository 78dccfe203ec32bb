"""Functions of others that a recorded step goes through: watched while a trace lasts, and put back as they were.

backward's root            the loss, as it is differentiated
gradient norm, clipping    Megatron's, or torch's
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["watch"]

OPTIMIZER = "megatron.core.optimizer.optimizer"
SCHEDULES = "megatron.core.pipeline_parallel.schedules"


def watch(
    on_loss: Callable[[torch.Tensor], None], on_norm: Callable[[float], None], on_limit: Callable[[float], None]
) -> Iterator[Callable[[], None]]:
    """Watch from now on; yields what takes each watch off again."""

    def loss(args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:
        roots = args[0] if args else kwargs.get("tensors", kwargs.get("output"))
        roots = roots if isinstance(roots, (tuple, list)) else [roots]
        given = args[1] if len(args) > 1 else kwargs.get("grad_tensors", kwargs.get("grad_output"))
        if len(roots) == 1 and isinstance(roots[0], torch.Tensor) and roots[0].numel() == 1 and _alone(given):
            on_loss(roots[0].detach())

    def clip(args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:
        on_limit(float(args[1] if len(args) > 1 else kwargs["max_norm"]))
        if (total := args[2] if len(args) > 2 else kwargs.get("total_norm")) is not None:
            on_norm(float(total))  # over all of Megatron's optimizers, of which experts have their own

    def norm_and_clip(args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:
        on_norm(float(answer.full_tensor() if hasattr(answer, "full_tensor") else answer))
        on_limit(float(args[1] if len(args) > 1 else kwargs["max_norm"]))

    yield _watched(torch.autograd, "backward", loss, before=True)
    yield _watched(torch.nn.utils, "clip_grad_norm_", norm_and_clip)
    for module, name, look in (
        (SCHEDULES, "custom_backward", loss),
        (OPTIMIZER, "clip_grad_by_total_norm_fp32", clip),
    ):
        if hasattr(sys.modules.get(module), name):
            yield _watched(sys.modules[module], name, look, before=look is loss)


def _alone(given: Any) -> bool:
    return given is None or (isinstance(given, (tuple, list)) and all(one is None for one in given))


def _watched(
    owner: Any, name: str, look: Callable[[tuple[Any, ...], dict[str, Any], Any], None], before: bool = False
) -> Callable[[], None]:
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if before:  # Megatron frees the root's values
            look(args, kwargs, None)
        answer = original(*args, **kwargs)
        if not before:
            look(args, kwargs, answer)
        return answer

    setattr(owner, name, call)
    return lambda: setattr(owner, name, original)

"""The handle of a collective that is under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["AsyncResult"]


@dataclass(frozen=True)
class AsyncResult:
    """A tensor that `wait()` waits for, once.

    It holds its buffers until then. Ranks must begin collectives of a group in the same order, and wait for each.
    """

    wait: Callable[[], Tensor]

    @classmethod
    def of(cls, x: Tensor) -> AsyncResult:
        """What needs no waiting for."""
        return cls(lambda: x)

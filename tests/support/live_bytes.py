"""How many bytes of new tensors are alive at once while operations run."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations under it make, from when they are made until nobody holds them.

    Attributes:
        peak: the most bytes that were alive after an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in _tensors([*args, *(kwargs or {}).values()])}
        for x in _tensors([result]):
            storage = x.untyped_storage()
            if storage._cdata not in given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self._count() > self.peak:
            gc.collect()  # Triton's interpreter leaves its arguments in cycles
            self.peak = max(self.peak, self._count())
        return result

    def _count(self) -> int:
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        return sum(size for _, size in self._alive.values())


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    flat = [each for value in values for each in (value if isinstance(value, (tuple, list)) else [value])]
    return [x for x in flat if isinstance(x, torch.Tensor)]

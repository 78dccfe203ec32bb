"""What TE asks torch.cuda, answered for its own modules only: everybody else still sees a machine without a GPU."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

FACTORIES = (
    "empty zeros ones full rand randn randint arange tensor empty_like zeros_like ones_like empty_strided".split()
)
H100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="stand-in", total_memory=1 << 34)


def look_like_cuda_to_te() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = _for_te(cuda.is_available, lambda: True)
    torch.Tensor.is_cuda = property(_is_cuda)  # type: ignore[assignment, method-assign]
    cuda.device_count = lambda: 1
    cuda.get_device_properties = lambda *args: H100
    cuda.get_device_capability = lambda *args: (H100.major, H100.minor)
    cuda.is_current_stream_capturing = lambda: False
    cuda.current_device = lambda: torch.device("cpu")
    cuda.default_generators = (torch.default_generator,)
    cuda.nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.device = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.set_device = lambda *args: None
    cuda.synchronize = lambda *args: None
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _asked_by_te() -> bool:
    frame: Any = sys._getframe(2)
    while frame.f_globals.get("__name__") == "patches.cpu":  # which hands on what is not for it
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).startswith("transformer_engine")


def _for_te(own: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(own)(lambda *args, **kwargs: (answer if _asked_by_te() else own)(*args, **kwargs))


_own_is_cuda = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


def _is_cuda(tensor: torch.Tensor) -> bool:
    return _asked_by_te() or _own_is_cuda(tensor)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if isinstance(device, int) or str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return call

"""Importing transformer_engine without its shared libraries."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import patches

TRITON = ("triton", "triton.language", "triton.language.core", "triton.language.standard")


def te_version() -> str | None:
    """The version of Transformer Engine on the path; None without one."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        return version("transformer-engine")
    except PackageNotFoundError:
        return None


def needs_stand_in() -> bool:
    return not torch.cuda.is_available()


@functools.cache
def install() -> None:
    """Make `import transformer_engine.pytorch` work in this process; a machine with a GPU is left alone."""
    if not needs_stand_in():
        return
    from tests.support.te_cpu.extension import extension
    from tests.support.te_cpu.machine import look_like_cuda_to_te

    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # transformer_engine.common: load no shared library
    os.environ["NVTE_FLASH_ATTN"] = os.environ["NVTE_FUSED_ATTN"] = "0"
    sys.modules["transformer_engine_torch"] = extension()
    look_like_cuda_to_te()
    _import_te()
    patches.cpu.enable()  # imports megatron, which imports transformer_engine
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN"):
        del os.environ[name]  # megatron sets them from its own `attention_backend`


def _import_te() -> None:
    """Run transformer_engine/__init__.py with the one function that loads the extension's file taken out."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.loader is not None
    package = sys.modules["transformer_engine"] = importlib.util.module_from_spec(spec)
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    package.common = common  # type: ignore[attr-defined]
    from torch.utils._triton import has_triton_package

    has_triton_package()  # torch remembers the answer: it must not see the stand-in
    stubs = [] if importlib.util.find_spec("triton") else [_triton(name) for name in TRITON]
    try:
        spec.loader.exec_module(package)
    finally:
        for stub in stubs:
            del sys.modules[stub.__name__]


class _Anything:
    """Whatever a Triton kernel's decorators and annotations ask for; the kernels are never launched."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __getitem__ = __or__


def _triton(name: str) -> types.ModuleType:
    module: Any = types.ModuleType(name)
    module.__path__, module.__version__, module.__spec__ = [], "3.4.0", ModuleSpec(name, None)
    module.__getattr__ = _Anything().__getattr__
    sys.modules[name] = module
    return module

"""ATen's local kernels: see `patches.aten.overrides` for what is covered."""

from __future__ import annotations

import torch

from patches.aten.overrides import LocalInvariance
from patches.contract import Contract, UnsupportedError
from patches.order import products
from patches.registry import Patch, Undo

__all__ = ["PATCHES"]


def _refuse(message: str) -> None:
    raise UnsupportedError(message)


def _install(contract: Contract) -> Undo:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    local = LocalInvariance(device.upper(), _refuse)

    def undo() -> None:
        products.keep_to(None)
        local.remove()

    try:
        products.keep_to(device)
    except UnsupportedError:
        undo()
        raise

    return undo


PATCHES = [
    Patch(
        "local-kernels",
        "torch:ops.aten",
        "libraries pick a kernel, hence an order of summation, by shapes that TP changes",
        _install,
    )
]

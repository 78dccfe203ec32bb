"""ATen's local kernels: see `patches.aten.overrides` for what is covered."""

from __future__ import annotations

from contextlib import ExitStack

from patches.aten.overrides import LocalInvariance
from patches.contract import Contract
from patches.order.backend import pin_device, training_device
from patches.registry import Patch, Undo

__all__ = ["PATCHES"]


def _install(contract: Contract) -> Undo:
    device = training_device().type
    with ExitStack() as undo:
        pin_device(device)  # its kernels, when they are imported, may keep some of ATen's own
        undo.callback(pin_device, None)
        undo.callback(LocalInvariance(device.upper()).remove)
        return undo.pop_all().close


PATCHES = [
    Patch(
        "local-kernels",
        "torch:ops.aten",
        "libraries pick a kernel, hence an order of summation, by shapes that TP changes",
        _install,
    )
]

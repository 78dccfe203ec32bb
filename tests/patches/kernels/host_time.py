"""Microseconds that the host spends on a product before the GPU has it, without a GPU: `python -m … .host_time`.

Triton runs as it does on a GPU, down to its launcher written in C and the encoding of TMA descriptors: these two, and
nothing else, are replaced by functions that do nothing. Tensors lie on the CPU, where allocating costs about as much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from patches.order.kernels import gemm, launches, plans
from tests.patches.kernels.driver import Driver

_launch = plans.Plan.launch

CALLS = 3000


class Silent(Driver):
    """A driver whose launches do nothing."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (None, 0, 0, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 1 << 20},
        fill_tma_descriptor=lambda *_: None,
    )

    @staticmethod
    def launcher_cls(source, metadata):
        from triton.backends.nvidia.driver import wrap_handle_tensordesc

        described = getattr(metadata, "tensordesc_meta", None)
        signature = dict(enumerate(source.signature.values()))
        launch = wrap_handle_tensordesc(lambda *_: None, signature, described)
        return lambda x, y, z, stream, function, *arguments: launch(
            x, y, z, stream, function, False, False, None, None, *arguments
        )


def main() -> None:
    from triton.runtime import driver

    driver.set_active(Silent())
    here = nullcontext()
    launches.on = lambda x: here
    plans.processors = lambda device: 132
    plans._check = lambda *_: None
    x, w = torch.empty(2048, 4096).bfloat16(), torch.empty(1024, 4096).bfloat16()
    into, dy = torch.zeros(1024, 4096), torch.empty(2048, 1024).bfloat16()
    calls = {
        "forward": lambda: gemm.product(x, w.t(), dtype=torch.bfloat16),
        "8 leaves": lambda: gemm.product(x, w.t(), 8, dtype=torch.bfloat16),
        "wgrad": lambda: gemm.add_product(into, dy.t(), x),
        "torch.empty": lambda: torch.empty(2048, 1024, dtype=torch.bfloat16),
    }
    for name, call in calls.items():
        call()
        whole = min(_timed(call) for _ in range(5))
        launch, plans.Plan.launch = plans.Plan.launch, _without_launcher
        ours = min(_timed(call) for _ in range(5))
        plans.Plan.launch = launch
        print(f"{name}: {whole * 1e6:.1f} µs, of which ours {ours * 1e6:.1f}")


def _without_launcher(plan: Any, *arguments: Any) -> None:
    compiled, plan._compiled = plan._compiled, lambda *_: None
    _launch(plan, *arguments)
    plan._compiled = compiled


def _timed(call: Callable[[], object]) -> float:
    began = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - began) / CALLS


if __name__ == "__main__":
    main()

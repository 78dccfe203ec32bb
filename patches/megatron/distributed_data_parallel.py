"""megatron.core.distributed.distributed_data_parallel: gradients that reach a parameter through autograd.

Where sums over the batch have no order, backward has added what it computed; autograd brings zeros.
"""

from __future__ import annotations

from typing import Any

import torch

from patches.ops.sequences import batch_sum
from patches.registry import attribute

__all__ = ["PATCHES"]


def _make_backward_post_hook(original: Any) -> Any:
    def make(self: Any, param: torch.nn.Parameter) -> Any:
        hook = original(self, param)

        @torch.no_grad()
        def checked(*unused: Any) -> None:
            if param.grad is not None:
                batch_sum(param).refuse(param.grad)
                param.grad_added_to_main_grad = True  # type: ignore[attr-defined]
            # Megatron would add the zeros to a shared embedding's main_grad, whose memory holds integers.
            zero_out = getattr(param, "zero_out_wgrad", False)
            param.zero_out_wgrad = False  # type: ignore[attr-defined]
            try:
                hook(*unused)
            finally:
                param.zero_out_wgrad = zero_out  # type: ignore[attr-defined]

        return checked

    return make


PATCHES = [
    attribute(
        "autograd-sums",
        "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel._make_backward_post_hook",
        "autograd sums the sequences of a micro-batch: a gradient that comes this way is refused",
        _make_backward_post_hook,
        parameters="param",
        order_free=True,
    )
]

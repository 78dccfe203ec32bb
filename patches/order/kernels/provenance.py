"""Which sums go to the Triton kernels of the `*_gpu` modules; the others are exact, in ATen's arithmetic."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["contract", "serve"]


def serve(device: torch.device) -> bool:
    """Whether kernels sum what lies on `device`."""
    return device.type == "cuda"


def contract() -> dict[str, Any]:
    """What the bits of the kernels' sums depend on besides their summands, for the manifest."""
    from patches.order.kernels import embedding, softmax

    return {
        "order": "adjacent pairs",
        "chunk of exponentials": softmax.CHUNK,
        "longest row in one chunk": softmax.SHORT,
        "tokens added at once": embedding.BLOCK,
    }

"""Which sums go to the Triton kernels of the `*_gpu` modules; the others are exact, in ATen's arithmetic."""

from __future__ import annotations

import torch

__all__ = ["serve"]


def serve(device: torch.device) -> bool:
    """Whether kernels sum what lies on `device`."""
    return device.type == "cuda"

"""The dtypes that a run file names."""

from __future__ import annotations

import torch

__all__ = ["DTYPES"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

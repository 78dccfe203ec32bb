"""What GPUs could do at best, as their vendor's datasheets have it. No GPU sustains these figures."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GPUS", "NVLINK_DOMAIN", "Gpu"]

NVLINK_DOMAIN = 8  # GPUs that NVLink and NVSwitch connect


@dataclass(frozen=True)
class Gpu:
    """One GPU of a board."""

    name: str
    tflops: float  # bfloat16 with float32 accumulation, dense: half of what a table "with sparsity" says
    memory_gb: float  # 10^9 bytes
    nvlink_gbs: float  # 10^9 bytes per second in one direction: half of the "total bandwidth"


GPUS = {
    "a100": Gpu("A100 80GB SXM", 312, 80, 300),
    "h100": Gpu("H100 SXM", 989, 80, 450),
    "h200": Gpu("H200 SXM", 989, 141, 450),
    "b200": Gpu("B200 (HGX)", 2250, 180, 900),
    "b300": Gpu("B300 (HGX)", 2250, 288, 900),
}

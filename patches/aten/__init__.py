"""ATen's own kernels, made independent of shape where TP changes shapes."""

from __future__ import annotations

from patches.aten.patch import PATCHES

__all__ = ["PATCHES"]

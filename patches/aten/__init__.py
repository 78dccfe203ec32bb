"""ATen's own kernels, made independent of shape where TP changes shapes; and none compiled instead of them."""

from __future__ import annotations

from patches.aten import compiler, patch

__all__ = ["PATCHES"]

PATCHES = [*compiler.PATCHES, *patch.PATCHES]

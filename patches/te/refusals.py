"""Transformer Engine's other modules, refused where they would compute."""

from __future__ import annotations

from typing import Any

from patches.contract import UnsupportedError
from patches.registry import Patch
from patches.te.context import te_attribute

__all__ = ["PATCHES"]

# patch: (target, what it is, the way out)
UNCOVERED = {
    "te-op-fuser": (
        "ops.fuser:OperationFuser.__call__", "te.ops other than norms", "set use_transformer_engine_op_fuser=False"
    ),
    "te-cross-entropy": (
        "cross_entropy:parallel_cross_entropy", "its cross-entropy", "use cross_entropy_fusion_impl='native'"
    ),
}  # fmt: skip


def _refusal(what: str, way_out: str) -> Any:
    def replacement(original: Any) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise UnsupportedError(f"transformer_engine: {what} is not covered by the patches: {way_out}")

        return refuse

    return replacement


PATCHES: list[Patch] = [
    te_attribute(name, f"transformer_engine.pytorch.{target}", f"refused: {what}", _refusal(what, way_out))
    for name, (target, what, way_out) in UNCOVERED.items()
]

"""Bit-identical training at every tensor-parallel size, for megatron-core and Transformer Engine.

    import patches
    patches.enable()                                # strategy="tree", leaves=8
    patches.enable(batch="order-free")              # and at every PP, DP and micro-batch size
    patches.enable(batch="order-free", chunks=8)    # and at CP=1, 2 and 4

Call it before the model is built. `patches.status()` shows what is on; `patches.disable()` puts everything back.
Settings that the promise does not cover raise `patches.UnsupportedError` when they are first met.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from patches import cpu
from patches.contract import Attention, Batch, Contract, Strategy, UnsupportedError
from patches.order.backend import backend, training_device
from patches.registry import REGISTRY, Patch, Row, check_versions

__all__ = ["Batch", "Contract", "Status", "UnsupportedError", "cpu", "disable", "enable", "enabled", "status"]


def enable(
    strategy: Strategy = "tree",
    leaves: int = 8,
    attention: Attention | None = None,
    symmetric_memory: bool = False,
    batch: Batch = "ordered",
    chunks: int = 1,
) -> None:
    """Patch megatron-core, and Transformer Engine where it is installed, in this process.

    Args:
        strategy: "tree" sums shards in the order of a fixed binary tree; "gather" sums gathered operands.
        leaves: leaves of the tree, a power of two; the TP size must divide it.
        attention: "blockwise" (default on a GPU, and with chunks), "unfused" (default on a CPU), or Transformer
            Engine's "flash" or "fused" (cuDNN), which is verified where it is met.
        symmetric_memory: tensor-parallel ranks of one node read each other's float32 roots instead of sending them
            through NCCL; the same bits. Not run on a GPU yet.
        batch: "order-free" sums over the sequences of the global batch exactly, in no order: pipeline stages,
            data-parallel ranks and micro-batch sizes change no bits either. Gradients take 8 bytes instead of 4.
        chunks: of order-free sums, into how many chunks each sequence is cut, a power of two: with 2·c of them, and any
            multiple, context parallelism up to c changes no bits either. Another number has other bits.

    Raises:
        ValueError: unknown strategy, attention or batch, leaves or chunks not a power of two, or chunks that the batch
            or the attention has none of.
        UnsupportedError: megatron-core is missing, a library of an unknown version, or no symmetric memory here.
        RuntimeError: already enabled with another contract.
    """
    device = training_device()
    attention = attention or ("blockwise" if chunks != 1 else backend(device).attention_unless_named)
    contract = Contract(strategy, leaves, attention, symmetric_memory, batch, chunks)
    if REGISTRY.contract == contract:
        return
    if symmetric_memory:
        backend(device).check_symmetric_memory(device)
    needed = check_versions(_all_patches())
    cpu.enable()
    REGISTRY.apply(contract, needed)


def disable() -> None:
    """Put every patched attribute back to the very object that was there before.

    `patches.cpu`, which only makes Megatron run without a GPU and changes no bits, stays.
    """
    REGISTRY.revert()


@contextmanager
def enabled(
    strategy: Strategy = "tree",
    leaves: int = 8,
    attention: Attention | None = None,
    symmetric_memory: bool = False,
    batch: Batch = "ordered",
    chunks: int = 1,
) -> Iterator[None]:
    """`enable` for the length of a `with` block."""
    enable(strategy, leaves, attention, symmetric_memory, batch, chunks)
    try:
        yield
    finally:
        disable()


class Status(list[Row]):
    """Rows of `status()`; printed as a table."""

    def __str__(self) -> str:
        lines = [("patch", "state", "library", "target", "why")]
        lines += [(r.name, r.state, f"{r.library} {r.version}", r.target, r.why) for r in self]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        return "\n".join("  ".join([*map(str.ljust, line[:4], widths), line[4]]) for line in lines)


def status() -> Status:
    """Every patch: its target, the version found, why it is there, whether it is applied."""
    return Status(REGISTRY.rows(_all_patches()))


def _all_patches() -> list[Patch]:
    from patches import aten, megatron, te

    return [*te.PATCHES, *megatron.REFUSALS, *aten.PATCHES, *megatron.PATCHES]

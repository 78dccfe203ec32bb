"""What is promised: one order for every sum, and the settings it does not cover.

`tree` walks the balanced binary tree over `leaves` equal leaves of a sharded dimension, wherever its ranks lie.
`gather` brings a sharded dimension's operands together on every rank and treats it as a single leaf.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

__all__ = [
    "DTYPES", "WITHOUT_SYMMETRIC_MEMORY", "Attention", "Batch", "Contract", "Strategy", "UnsupportedError",
    "refuse_first",
]  # fmt: skip

Strategy = Literal["tree", "gather"]
Attention = Literal["blockwise", "unfused", "flash", "fused"]
Batch = Literal["ordered", "order-free"]
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))  # whose sums are ordered; others are ATen's own
WITHOUT_SYMMETRIC_MEMORY = "leave symmetric_memory=False, which gives the same bits"


class UnsupportedError(RuntimeError):
    """A setting that the promise does not cover; the message names it and the way out."""


def refuse_first(settings: Iterable[tuple[object, str, str]], who: str = "", by: str = "") -> None:
    """Raise `UnsupportedError` for the first of `settings` that is found: whether it is, what it is, the way out."""
    for found, setting, way_out in settings:
        if found:
            raise UnsupportedError(f"{who}{setting} is not covered{by}: {way_out}")


@dataclass(frozen=True)
class Contract:
    """One order for every sum, whatever the tensor-parallel size.

    Args:
        strategy: "tree" (default) or "gather".
        leaves: leaves of a sharded dimension under `tree`, a power of two; it bounds the TP size.
        attention: "blockwise" (the patches' own: keys in blocks, O(S) memory), "unfused" (the library's: products and a
            softmax that the patches order), or Transformer Engine's "flash" or "fused" (cuDNN), which must be seen to
            compute each head by itself at every shape that is met.
        symmetric_memory: ranks read each other's roots in symmetric memory instead of sending them; the same bits.
        batch: "ordered" (default) adds micro-batches as they come and data-parallel ranks by the tree; "order-free"
            adds the sequences of the global batch exactly, so that no layout of data or pipeline changes a bit.
        chunks: of order-free sums, into how many equal chunks a sequence is cut, a power of two; each is summed by
            itself. Ranks of context parallelism own whole chunks, two runs of them: its size divides chunks/2.
    """

    strategy: Strategy = "tree"
    leaves: int = 8
    attention: Attention = "unfused"
    symmetric_memory: bool = False
    batch: Batch = "ordered"
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"strategy={self.strategy!r}: use one of {', '.join(get_args(Strategy))}")
        if self.attention not in get_args(Attention):
            raise ValueError(f"attention={self.attention!r}: use one of {', '.join(get_args(Attention))}")
        if self.batch not in get_args(Batch):
            raise ValueError(f"batch={self.batch!r}: use one of {', '.join(get_args(Batch))}")
        if not isinstance(self.leaves, int) or self.leaves < 1 or self.leaves & (self.leaves - 1):
            raise ValueError(f"leaves={self.leaves!r} is not a power of two: use 8, 16, …")
        if not isinstance(self.chunks, int) or self.chunks < 1 or self.chunks & (self.chunks - 1):
            raise ValueError(f"chunks={self.chunks!r} is not a power of two: use 1, 4, 8, …")
        if self.chunks > 1 and not self.order_free:
            raise ValueError(f"chunks={self.chunks} cuts sequences of sums without an order: use batch='order-free'")
        if self.chunks > 1 and self.attention != "blockwise":
            raise ValueError(
                f"chunks={self.chunks} takes attention='blockwise', which computes a part of the queries: "
                f"not {self.attention!r}"
            )

    @property
    def order_free(self) -> bool:
        """Whether sums over the batch have no order."""
        return self.batch == "order-free"

    def check_tp(self, size: int) -> None:
        """Raise `UnsupportedError` for a TP size whose ranks do not own whole subtrees."""
        if self.strategy == "tree" and self.leaves % size:
            raise UnsupportedError(
                f"tp={size} does not divide leaves={self.leaves}: use a power of two up to {self.leaves}, "
                'or strategy="gather"'
            )

    def chunks_of_rank(self, cp: int) -> int:
        """How many chunks of a sequence one of `cp` context-parallel ranks owns.

        Raises:
            UnsupportedError: they are not two equal runs of whole chunks.
        """
        if cp > 1 and not self.order_free:
            raise UnsupportedError(
                f"context_parallel_size={cp} is not covered by batch='ordered': use patches.enable(batch='order-free', "
                f"chunks={2 * cp}) (--batch order-free --chunks {2 * cp}), or set it to 1 (--context-parallel-size 1)"
            )
        if cp > 1 and self.chunks % (2 * cp):
            raise UnsupportedError(
                f"context_parallel_size={cp} needs chunks to be a multiple of {2 * cp}, it is {self.chunks}: set it so "
                "in patches.enable(batch='order-free', chunks=…) (--chunks), at every context_parallel_size that is to "
                "have the same bits, and let that be a power of two"
            )
        return self.chunks // cp

    def leaves_of_rank(self, size: int) -> int:
        """How many leaves of a dimension one of `size` ranks owns."""
        self.check_tp(size)
        return self.leaves // size if self.strategy == "tree" else 1

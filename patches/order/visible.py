"""Which keys a query sees: a band around its own position, of its own sequence alone.

    keys     0 1 2 3 4 5 6 7        `offset` 4, `left` 3, `right` 0
    query 0    1 2 3 4              a query i of a sequence stands at position p = offset + i among its keys
          1      2 3 4 5            and sees those from p - left to p + right
          …

`offset` is all that a rank needs to compute a chunk of the queries: its keys and values are those of the whole
sequence, walked from position 0, so that a query's bits are the same on whatever rank its chunk lies. The chunks'
dk and dv are float32 roots of a tree over chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Packed", "Visible"]


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences side by side in one batch of rows: where each starts and how many rows it has, int32 [sequences].

    Rows between sequences are padding: nothing reads them, and their results are 0.
    """

    q_starts: Tensor
    q_lengths: Tensor
    k_starts: Tensor
    k_lengths: Tensor
    longest_q: int
    longest_k: int


@dataclass(frozen=True, eq=False)
class Visible:
    """The band, None for no end of it on that side: `right=0` is causal, neither is all keys.

    Args:
        left, right: how many keys before and after its own position a query sees.
        offset: position of the first query among the keys.
        packed: sequences of their own lengths in one; None where a batch's are of one length.
    """

    left: int | None = None
    right: int | None = None
    offset: int = 0
    packed: Packed | None = None

    def __post_init__(self) -> None:
        for name, size in (("left", self.left), ("right", self.right), ("offset", self.offset)):
            if size is not None and size < 0:
                raise ValueError(f"{name}={size} is below 0: use None for keys without end")

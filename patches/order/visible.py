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

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patches.contract import DTYPES

__all__ = ["WIDEST", "Packed", "Visible", "check_operands", "keys_at_once"]

WIDEST = 256


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

    @classmethod
    def of(
        cls, edges_q: Tensor, edges_k: Tensor, starts_q: Tensor | None = None, starts_k: Tensor | None = None
    ) -> Packed:
        """From cumulated lengths [sequences + 1] and, where padding lies between sequences, those with it.

        Waits for the device: the longest sequence decides how much is launched.
        """
        lengths = [edges.diff().int() for edges in (edges_q, edges_k)]
        starts = [
            (edges if padded is None else padded)[:-1].int()
            for edges, padded in ((edges_q, starts_q), (edges_k, starts_k))
        ]
        longest = [int(x.max()) if len(x) else 0 for x in lengths]
        return cls(starts[0], lengths[0], starts[1], lengths[1], *longest)


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


def keys_at_once(width: int, dtype: torch.dtype) -> int:
    """How many keys, from position 0, are a block: their largest score is found before a row's sums are scaled."""
    if dtype == torch.float32:
        return 32
    return 128 if width <= 128 else 64


def check_operands(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Raise `TypeError` or `ValueError` for operands that attention does not take."""
    if q.dtype not in DTYPES or {q.dtype} != {k.dtype, v.dtype}:
        raise TypeError(
            f"attention takes q, k and v of one dtype, float32, bfloat16 or float16: {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if (
        q.dim() != 4
        or k.shape != v.shape
        or q.shape[1::2] != k.shape[1::2]
        or not k.shape[2]
        or q.shape[2] % k.shape[2]
    ):
        raise ValueError(
            f"attention takes q [S, B, H, D], k and v [S, B, G, D], G a divisor of H: {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not 1 <= q.shape[3] <= WIDEST:
        raise ValueError(f"a head of width {q.shape[3]}: attention takes 1 to {WIDEST}")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale={scale}: use a number above 0")

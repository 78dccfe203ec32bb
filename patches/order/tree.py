"""The pairwise tree over leaves: where a sharded dimension is cut, and in which order its leaves are added.

    leaf   0   1   2   3   4   5   6   7        leaves = 8
            \\ /     \\ /     \\ /     \\ /
             +       +       +       +           TP=4: a rank owns one of these
               \\   /           \\   /
                 +               +               TP=2: a rank owns one of these
                     \\       /
                         +                       TP=1; rounded here, once, to the output dtype

A rank's leaves are a subtree, so every TP size that divides `leaves` walks the same tree.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["cuts", "sum_of_pairs", "tree_sum"]

T = TypeVar("T")


def cuts(size: int, leaves: int) -> list[tuple[int, int]]:
    """Start and end of every leaf of a dimension; leaf j starts at ⌊j·size/leaves⌋.

    Cutting a rank's equal share into its leaves gives the same places as cutting the whole dimension.
    """
    edges = [j * size // leaves for j in range(leaves + 1)]
    return list(pairwise(edges))


def tree_sum(parts: Iterable[T], add: Callable[[Any, Any], T] = operator.add) -> T:
    """Sum of `parts` by adjacent pairs, then pairs of pairs, …: at most log2(n) sums are pending at a time."""
    pending: list[tuple[int, T]] = []
    for part in parts:
        height = 0
        while pending and pending[-1][0] == height:
            part = add(pending.pop()[1], part)
            height += 1
        pending.append((height, part))
    total = pending.pop()[1]
    while pending:
        total = add(pending.pop()[1], total)
    return total


def sum_of_pairs(parts_L: Tensor) -> Tensor:
    """`tree_sum` along dimension 0, whose size is a power of two."""
    while len(parts_L) > 1:
        parts_L = parts_L[0::2] + parts_L[1::2]
    return parts_L[0]

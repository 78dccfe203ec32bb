"""The pairwise tree over leaves: where a sharded dimension is cut, and in which order its leaves are added.

    leaf   0   1   2   3   4   5   6   7        leaves = 8
            \\ /     \\ /     \\ /     \\ /
             +       +       +       +           TP=4: a rank owns one of these
               \\   /           \\   /
                 +               +               TP=2: a rank owns one of these
                     \\       /
                         +                       TP=1; rounded here, once, to the output dtype

A rank's leaves are a subtree, so every TP size that divides `leaves` walks the same tree. Legend: T tokens,
N result features, K the summed dimension, tK a rank's share of it, P pieces (2 for a gated fc1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from torch import Tensor

from patches.order.exact import exact_product_of, exact_sum, widened

__all__ = ["cuts", "tree_of_products", "tree_of_sums", "tree_sum"]


def cuts(size: int, leaves: int) -> list[tuple[int, int]]:
    """Start and end of every leaf of a dimension; leaf j starts at ⌊j·size/leaves⌋.

    Cutting a rank's equal share into its leaves gives the same places as cutting the whole dimension.
    """
    edges = [j * size // leaves for j in range(leaves + 1)]
    return list(pairwise(edges))


def tree_sum(parts: Iterable[Tensor]) -> Tensor:
    """Sum of `parts` by adjacent pairs, then pairs of pairs, …: at most log2(n) sums are pending at a time."""
    pending: list[tuple[int, Tensor]] = []
    for part in parts:
        height = 0
        while pending and pending[-1][0] == height:
            part = pending.pop()[1] + part
            height += 1
        pending.append((height, part))
    total = pending.pop()[1]
    while pending:
        total = pending.pop()[1] + total
    return total


def tree_of_products(a_TK: Tensor, b_KN: Tensor, leaves: int, pieces: int = 1) -> Tensor:
    """float32 root [T, N] of the tree over `leaves` products; leaf j takes its share of each of K's `pieces`.

    Args:
        a_TK: [T, K]; with pieces=2, K holds [gate | up] and leaf j is gate[j] ∪ up[j].
        b_KN: [K, N], cut likewise.
    """
    return tree_sum(_leaf_products(a_TK, b_KN, leaves, pieces))


def tree_of_sums(x: Tensor, dim: int, leaves: int, exact_dims: tuple[int, ...] = ()) -> Tensor:
    """float32 root of the tree over `leaves` sums along `dim`; `exact_dims` are summed inside every leaf."""
    dims = (dim, *exact_dims)
    return tree_sum(exact_sum(x.narrow(dim, lo, hi - lo), dims).float() for lo, hi in cuts(x.shape[dim], leaves))


def _leaf_products(a_TK: Tensor, b_KN: Tensor, leaves: int, pieces: int) -> Iterator[Tensor]:
    a_TPK = a_TK.unflatten(1, (pieces, -1)) if a_TK.shape[1] else a_TK.unsqueeze(1)
    b_PKN = b_KN.unflatten(0, (pieces, -1)) if b_KN.shape[0] else b_KN.unsqueeze(0)
    for lo, hi in cuts(a_TPK.shape[2], leaves):
        a, b = a_TPK[:, :, lo:hi], b_PKN[:, lo:hi]
        yield exact_product_of(_side_by_side(a, 1), _side_by_side(b, 0))


def _side_by_side(x: Tensor, dim: int) -> Tensor:
    """A leaf's pieces as one operand: widening it is the only copy made."""
    return widened(x.squeeze(dim)) if x.shape[dim] == 1 else widened(x).flatten(dim, dim + 1)

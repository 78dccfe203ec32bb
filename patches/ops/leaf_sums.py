"""What every batch leaf gives a parameter that its tokens share: a sum over its tokens, or over their heads.

    chunk      0        1        2        3       of a sequence, on two ranks of sequence parallelism (SP)
    leaves   01234567 01234567 01234567 01234567  of each, in a tree of their own
    rank     00000000 00000000 11111111 11111111  a rank has whole chunks, or a subtree of one

Where several ranks hold tokens, roots are added over all of them, zeros standing for what a rank has no part of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patches.ops.sequences import in_chunks
from patches.ops.sharded import Shards
from patches.order.backend import backend
from patches.order.collectives import begin_all_gather
from patches.order.handle import AsyncResult

__all__ = ["HEADS", "SEQUENCES", "TOKENS", "begin_gamma_gradients", "begin_leaf_sums"]

TOKENS, SEQUENCES, HEADS = 0, 1, 2  # dimensions of [s, b, h] and of [s, b, heads, d]


def begin_leaf_sums(x: Tensor, dim: int, shards: Shards) -> AsyncResult:
    """Σx of every batch leaf, float32 [chunks · b, h], whose part across ranks is under way.

    Args:
        x: [s, b, h], or [s, b, heads, d], whose heads are summed as well.
        dim: TOKENS or HEADS, the dimension that `shards` spreads over ranks.
    """
    compute, also = backend(x.device), () if dim == TOKENS else (TOKENS + 1,)
    if shards.contract.strategy == "gather":
        whole = begin_all_gather(x, shards.group, dim)

        def summed() -> Tensor:
            sums = compute.row_sums(in_chunks(whole.wait(), shards.chunks), (dim + 1, *also))
            return compute.rounded(sums.float(), torch.float32).flatten(0, 1)

        return AsyncResult(summed)
    chunks, leaves = _of_rank(dim, shards)
    return _begin_sum_over_ranks(compute.tree_of_sums(in_chunks(x, chunks), dim + 1, leaves, also), dim, shards)


def begin_gamma_gradients(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, dim: int, shards: Shards
) -> AsyncResult:
    """The same of dy·x̂, under `tree`; the normalised dimension alone is kept."""
    chunks, leaves = _of_rank(dim, shards)
    tree = backend(x.device).tree_of_gamma_gradients
    also = (SEQUENCES,) if dim == TOKENS else (SEQUENCES, TOKENS)
    dy, x, rstd = (in_chunks(t, chunks) for t in (dy, x, rstd))
    mean = None if mean is None else in_chunks(mean, chunks)
    roots = []
    for i in range(chunks):
        for j in range(x.shape[1 + SEQUENCES]):
            dy_j, x_j, rstd_j = (t[i].narrow(SEQUENCES, j, 1).contiguous() for t in (dy, x, rstd))
            mean_j = None if mean is None else mean[i].narrow(SEQUENCES, j, 1).contiguous()
            roots.append(tree(dy_j, x_j, mean_j, rstd_j, dim, leaves, also))
    return _begin_sum_over_ranks(torch.stack(roots).unflatten(0, (chunks, -1)), dim, shards)


def _of_rank(dim: int, shards: Shards) -> tuple[int, int]:
    """How many chunks this rank has tokens of, and how many leaves of each."""
    if dim == HEADS or shards.size == 1:
        return shards.chunks, shards.leaves
    sharers = max(1, shards.size // shards.chunks)
    return max(1, shards.chunks // shards.size), shards.contract.leaves // sharers


def _begin_sum_over_ranks(roots: Tensor, dim: int, shards: Shards) -> AsyncResult:
    """Float32 `roots` [chunks, b, h] of what this rank has, summed over all of them: [all chunks · b, h]."""
    if len(roots) < shards.chunks:
        own, roots = roots, roots.new_zeros(shards.chunks, *roots.shape[1:])
        first = shards.rank * shards.chunks // shards.size
        roots[first : first + len(own)] = own
    return shards.begin_reduce_root(roots.flatten(0, 1), torch.float32)

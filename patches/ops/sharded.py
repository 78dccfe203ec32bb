"""Sums over a dimension that is spread over ranks, by either strategy.

    tree     each rank sums its own leaves; float32 roots are summed across ranks (`order.collectives`)
    gather   operands are brought together, then one exact sum over the whole dimension on every rank

Legend: T tokens, N result features, K the summed dimension, tK a rank's share of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from patches.contract import Contract
from patches.order.backend import backend
from patches.order.collectives import all_gather, begin_all_gather, begin_all_reduce, begin_reduce_scatter
from patches.order.handle import AsyncResult
from patches.order.products import product

__all__ = ["Shards"]


@dataclass(frozen=True)
class Shards:
    """A dimension in equal shares over the ranks of `group`, or whole on every rank where `group` is None.

    Args:
        context: the context-parallel ranks, which hold other chunks of the same sequences; None where there are none.
    """

    contract: Contract
    group: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        self.contract.check_tp(self.size)

    @property
    def size(self) -> int:
        return self.group.size() if self.group is not None else 1

    @property
    def rank(self) -> int:
        return self.group.rank() if self.group is not None else 0

    @property
    def leaves(self) -> int:
        """Leaves of the dimension that this rank owns."""
        return self.contract.leaves_of_rank(self.size)

    @property
    def chunks(self) -> int:
        """Chunks of every sequence, batch leaves, that the ranks of `group` hold: one after the other."""
        return self.contract.chunks_of_rank(1 if self.context is None else self.context.size())

    def one_leaf(self) -> Shards:
        """A dimension that every rank holds whole, and that no tensor-parallel size ever cuts."""
        return Shards(replace(self.contract, leaves=1), context=self.context)

    def local(self, ids: Tensor, share: int) -> tuple[Tensor, Tensor]:
        """`ids` in the whole dimension as places in this rank's `share`, and which of them lie on other ranks."""
        places = ids - self.rank * share
        return places, (places < 0) | (places >= share)

    def product(
        self, a_TtK: Tensor, b_tKN: Tensor, dtype: torch.dtype, pieces: int = 1, scatter: bool = False
    ) -> Tensor:
        """Σ over all ranks of a·b, rounded once to `dtype`: [T, N] on every rank, or its rows' share if `scatter`.

        Args:
            a_TtK: [T, tK], float32, bfloat16 or float16.
            b_tKN: [tK, N].
            pieces: 2 where a rank's K holds [gate_r | up_r] of a gated layer, else 1.
        """
        return self.begin_product(a_TtK, b_tKN, dtype, pieces, scatter).wait()

    def begin_product(
        self, a_TtK: Tensor, b_tKN: Tensor, dtype: torch.dtype, pieces: int = 1, scatter: bool = False,
        beside_collective: bool = False,
    ) -> AsyncResult:  # fmt: skip
        """`product`, whose part across ranks is under way while the caller computes something else.

        Args:
            beside_collective: another one is under way already while this rank's own part is computed.
        """
        if self.contract.strategy == "gather":
            a_TK, b_KN = (self._gather_pieces(x, dim, pieces) for x, dim in ((a_TtK, 1), (b_tKN, 0)))
            out = product(a_TK, b_KN, dtype=dtype)
            return AsyncResult.of(out.chunk(self.size)[self.rank].contiguous() if scatter else out)
        if self.size == 1:
            return AsyncResult.of(product(a_TtK, b_tKN, self.leaves, pieces, dtype))
        root = product(a_TtK, b_tKN, self.leaves, pieces, beside_collective=beside_collective)
        return self.begin_reduce_root(root, dtype, scatter)

    def sum_over(self, x: Tensor, dim: int, dtype: torch.dtype, exact_dims: tuple[int, ...] = ()) -> Tensor:
        """Σx over the sharded `dim` of all ranks, rounded once to `dtype`: the other dimensions, on every rank.

        Args:
            exact_dims: dimensions that every rank holds whole, and that are summed with it.
        """
        return self.begin_sum_over(x, dim, dtype, exact_dims).wait()

    def begin_sum_over(self, x: Tensor, dim: int, dtype: torch.dtype, exact_dims: tuple[int, ...] = ()) -> AsyncResult:
        """`sum_over`, whose part across ranks is under way while the caller computes something else."""
        compute = backend(x.device)
        if self.contract.strategy == "gather":
            whole = begin_all_gather(x, self.group, dim % x.dim())
            return AsyncResult(
                lambda: compute.rounded(compute.row_sums(whole.wait(), (dim, *exact_dims)).float(), dtype)
            )
        return self.begin_reduce_root(compute.tree_of_sums(x, dim, self.leaves, exact_dims), dtype)

    def reduce_root(self, root: Tensor, dtype: torch.dtype) -> Tensor:
        """The tree's upper levels: the float32 roots of all ranks summed, rounded once to `dtype`, in their shape."""
        return self.begin_reduce_root(root, dtype).wait()

    def begin_reduce_root(self, root: Tensor, dtype: torch.dtype, scatter: bool = False) -> AsyncResult:
        """`reduce_root`, or this rank's slice of it along dimension 0 if `scatter`, whose roots begin to travel."""
        if self.group is None:
            return AsyncResult.of(backend(root.device).rounded(root, dtype))
        begin = begin_reduce_scatter if scatter else begin_all_reduce
        return begin(root, self.group, dtype, symmetric=self.contract.symmetric_memory)

    def _gather_pieces(self, x: Tensor, dim: int, pieces: int) -> Tensor:
        parts = [all_gather(piece, self.group, dim) for piece in x.chunk(pieces, dim)]
        return parts[0] if pieces == 1 else torch.cat(parts, dim)

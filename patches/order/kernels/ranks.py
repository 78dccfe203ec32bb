"""The receiving side of `order.collectives` on a GPU: ranks' float32 parts in, their rounded tree sum out, in one pass.

    parts   0   1   2   3   4   5          each element is read once from every rank's part, added in the tree's
             \\ /     \\ /     \\ /            order, divided where asked for, rounded once and written once
              └──+────┘       │
                 └────+───────┘

A part lies where all-to-all put it, or in a peer's symmetric memory, where it is read through its address. Which of
the two changes no bit: the additions are those of `order.tree.tree_sum`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from patches.contract import WITHOUT_SYMMETRIC_MEMORY, UnsupportedError
from patches.order.handle import AsyncResult
from patches.order.kernels.pairs import DTYPES, INTERPRETED, on, power_of_two, rounded

__all__ = ["begin_reading_peers", "check_symmetric_memory", "rounded_tree_sum", "sum_of_peers"]

BLOCK, WARPS = 1024, 4
MAX_PARTS = 16  # that one launch holds in registers, a power of two; of more, subtrees of so many are summed first


def rounded_tree_sum(parts_tN: Tensor, dtype: torch.dtype, divide_by: int = 1) -> Tensor:
    """`tree_sum` of float32 `parts_tN` [t, N] over t, divided by a whole number, rounded once to `dtype`: [N]."""
    parts_tN = parts_tN.contiguous()
    while len(parts_tN) > MAX_PARTS:
        parts_tN = torch.stack([_launch(subtree, parts_tN.shape[1]) for subtree in parts_tN.split(MAX_PARTS)])
    return _launch(parts_tN, parts_tN.shape[1], dtype, divide_by)


def sum_of_peers(addresses_t: Tensor, start: int, size: int, dtype: torch.dtype, divide_by: int = 1) -> Tensor:
    """The same of elements start … start+size-1 of the float32 buffers at `addresses_t`, int64 and 16-byte aligned."""
    if len(addresses_t) > MAX_PARTS:
        raise ValueError(f"{len(addresses_t)} ranks are too many to read from at once: {MAX_PARTS} at most")
    return _launch(addresses_t, size, dtype, divide_by, start)


def _launch(parts: Tensor, size: int, dtype: torch.dtype = torch.float32, divide_by: int = 1, start: int = 0) -> Tensor:
    """`parts`: float32 [t, size], or addresses, int64 [t]."""
    if parts.dtype not in (torch.float32, torch.int64) or dtype not in DTYPES:
        raise TypeError(f"float32 is summed and rounded to one of {', '.join(map(str, DTYPES))}, not {dtype}")
    # The interpreter does not round to bfloat16 correctly: there torch does.
    out = torch.empty(size, dtype=torch.float32 if INTERPRETED else dtype, device=parts.device)
    if size:
        with on(parts):
            tree_sum_kernel[(triton.cdiv(size, BLOCK),)](
                parts, out, size, start, divide_by,
                RANKS=len(parts), PEERS=parts.dtype == torch.int64, DIVIDE=divide_by > 1, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return out if out.dtype == dtype else rounded(out, dtype)


def begin_reading_peers(root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1) -> AsyncResult:
    """`begin_reduce_scatter` over symmetric memory: each rank reads its slice in its peers' buffers.

        this stream    copy of root │                  │ use of the slice
        aside                       │ barrier, sum, barrier │

    The first barrier says that every root is there, the second that all were read. Written after the documentation and
    source of torch 2.11 to 2.13, and not run yet: it needs two GPUs that reach each other.
    """
    check_symmetric_memory(root.device)
    size, rank, share = group.size(), group.rank(), root.numel() // group.size()
    # Buffers are kept: few sizes, however many shapes.
    buffer, handle, addresses_t = _buffer(group, power_of_two(root.numel()), root.device)
    here, aside = torch.cuda.current_stream(root.device), _aside(root.device)
    here.wait_stream(aside)
    buffer[: root.numel()].copy_(root.reshape(-1))
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        handle.barrier()
        out = sum_of_peers(addresses_t, rank * share, share, dtype, divide_by)
        handle.barrier()

    def finish() -> Tensor:
        torch.cuda.current_stream(root.device).wait_stream(aside)
        out.record_stream(torch.cuda.current_stream(root.device))
        return out.view(root.shape[0] // size, *root.shape[1:])

    return AsyncResult(finish)


def check_symmetric_memory(device: torch.device) -> None:
    """Raise `UnsupportedError` where torch can tell that ranks cannot read each other's memory."""
    try:
        from torch.distributed import _symmetric_memory
    except ImportError as error:
        raise UnsupportedError(
            f"symmetric_memory=True: torch {torch.__version__} has none: {WITHOUT_SYMMETRIC_MEMORY}"
        ) from error
    if _symmetric_memory.get_backend(device) is None:
        raise UnsupportedError(
            f"symmetric_memory=True: torch has no backend of it for {device}: {WITHOUT_SYMMETRIC_MEMORY}"
        )


@functools.cache
def _buffer(group: dist.ProcessGroup, count: int, device: torch.device) -> tuple[Tensor, Any, Tensor]:
    """float32 [count] that the group's ranks read, its handle and everybody's address; all ranks ask for the same."""
    from torch.distributed import _symmetric_memory

    buffer = _symmetric_memory.empty(count, dtype=torch.float32, device=device)
    try:
        handle = _symmetric_memory.rendezvous(buffer, group)
    except RuntimeError as error:
        raise UnsupportedError(
            f"symmetric_memory=True: the ranks cannot read each other's memory ({error}): {WITHOUT_SYMMETRIC_MEMORY}"
        ) from error
    if 0 in handle.buffer_ptrs:
        raise UnsupportedError(f"symmetric_memory=True: the ranks are on several nodes: {WITHOUT_SYMMETRIC_MEMORY}")
    offset = buffer.data_ptr() - handle.buffer_ptrs[handle.rank]  # torch's addresses are those of whole allocations
    addresses_t = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device) + offset
    return buffer, handle, addresses_t


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@triton.jit
def tree_sum_kernel(
    parts, out, size, start, divide_by,
    RANKS: tl.constexpr, PEERS: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = Σ_r part_r[start + i]; `parts` is float32 [RANKS, size], or RANKS addresses (int64) if PEERS."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = _subtree(parts, size, start + index, inside, 0, RANKS, PEERS)
    if DIVIDE:
        total = tl.div_rn(total, divide_by.to(tl.float32))
    y = total.to(out.dtype.element_ty)
    y = tl.where(y == 0, tl.zeros_like(y), y)
    y = tl.where(y != y, tl.full(y.shape, float("nan"), y.dtype), y)
    tl.store(out + index, y, mask=inside)


@triton.jit
def _subtree(parts, size, index, inside, FIRST: tl.constexpr, RANKS: tl.constexpr, PEERS: tl.constexpr):
    """The tree over parts FIRST … FIRST+RANKS-1: its left branch takes the largest power of two below RANKS."""
    if RANKS > 1:
        LEFT: tl.constexpr = 1 << ((RANKS - 1).bit_length() - 1)
        left = _subtree(parts, size, index, inside, FIRST, LEFT, PEERS)
        return left + _subtree(parts, size, index, inside, FIRST + LEFT, RANKS - LEFT, PEERS)
    elif PEERS:
        part = tl.load(parts + FIRST).to(tl.pointer_type(tl.float32))
        return tl.load(tl.multiple_of(part, 16) + index, mask=inside, other=0.0)
    else:
        return tl.load(parts + tl.full((), FIRST, tl.int64) * size + index, mask=inside, other=0.0)

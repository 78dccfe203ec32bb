"""What a product's launch needs, decided once for operands that are laid out alike, and then kept.

A plan follows from shapes, strides, dtypes and alignment alone: tile, programs, loads by TMA or by pointers, Triton's
compiled kernel (`launches`).
Legend: M, N result, K summed, B batch, R rows of an operand, be they M or N.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from patches.contract import UnsupportedError
from patches.order.kernels.gemm_kernel import kernel
from patches.order.kernels.launches import Launch
from patches.order.kernels.pairs import INTERPRETED, rounded
from patches.order.kernels.tiles import Tile, tile_of

__all__ = [
    "NAMES",
    "How",
    "Layout",
    "Plan",
    "by_leaf",
    "constants",
    "family",
    "free_processors",
    "layout_of",
    "plan",
    "processors",
    "suits_tma",
]

INTERPRETED_PROCESSORS = 3
# Multiprocessors left to a collective that is under way: NCCL's blocks do not fit on one beside a product's, and these
# stay until the product is done. An estimate: NCCL takes up to 32 blocks for an all-to-all over NVLink.
SPARED = 16
GROUP_M = 8
PLANS = 4096  # that are kept; a model's step has some dozens
FAMILIES = (9, 10)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Layout(NamedTuple):
    """Where a tensor's elements lie, apart from the address itself."""

    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    misaligned: int  # bytes beyond a multiple of 16

    @property
    def batched(self) -> Layout:
        """[B, rows, columns], of one batch where there is none."""
        if len(self.shape) == 3:
            return self
        return self._replace(shape=(1, *self.shape), strides=(self.shape[0] * self.strides[0], *self.strides))

    @property
    def transposed(self) -> Layout:
        (B, R, C), (by_B, by_R, by_C) = self.shape, self.strides
        return self._replace(shape=(B, C, R), strides=(by_B, by_C, by_R))

    @property
    def along_k(self) -> bool:
        """Of [B, R, K]: whether K, rather than the rows, lies side by side in memory."""
        return self.strides[2] == 1 or self.strides[1] != 1


def layout_of(x: Tensor) -> Layout:
    """Of [B, rows, columns], or of one such matrix."""
    return Layout(x.device, x.shape, x.stride(), x.dtype, x.data_ptr() % 16).batched


class How(NamedTuple):
    """What becomes of a root, and what else the device does meanwhile."""

    added: bool = False
    in_units: bool = False  # of the batch's grid
    scaled: bool = False
    beside_collective: bool = False
    varies: str = ""  # of several products in one launch: M or K
    aligned: bool = False  # their addresses, to 16 bytes


class Plan(Launch):
    """A launch of `gemm_kernel`, with the tile that suits it, or the one given; its scalar is the scale."""

    def __init__(
        self,
        a_BRK: Layout,
        b_BRK: Layout,
        out_BMN: Layout,
        leaves: int,
        pieces: int,
        how: How,
        tile: Tile | None = None,
    ) -> None:
        B, M, N = out_BMN.shape
        parts = leaves * pieces
        tma = suits_tma(a_BRK, parts) and suits_tma(b_BRK, parts)
        free = free_processors(a_BRK.device, how.beside_collective)
        tile = tile or tile_of(a_BRK.dtype, leaves, tma, (B, M, N), free)
        tiles_m, tiles_n = triton.cdiv(M, tile.m), triton.cdiv(N, tile.n)
        tiles = B * tiles_m * tiles_n
        programs = min(free, tiles)
        levels = leaves.bit_length() - 1 - tile.register_levels
        K = a_BRK.shape[2] // pieces
        self.by_tma, self.rounds = tma, tiles / programs
        steps = triton.cdiv(triton.cdiv(K, leaves), tile.k)
        numbers = (M, N, K, steps, tiles_m, tiles_n, tiles, *a_BRK.strides, *b_BRK.transposed.strides)
        super().__init__(
            kernel,
            a_BRK.device,
            programs,
            programs * max(levels, 0) * tile.m * tile.n,
            (_described(a_BRK, parts, tile.m, tile.k), _described(b_BRK, parts, tile.n, tile.k))
            if tma
            else (_itself, _itself),
            (*numbers, *out_BMN.strides),
            constants(tile, leaves, pieces, tma, a_BRK, b_BRK, how),
            {"num_warps": tile.warps, "num_stages": tile.stages},
        )

    def launch(self, a: Tensor, b: Tensor, out: Tensor, scale: float, largest: Tensor | None = None) -> None:
        super().launch(a, b, out, scale, largest, None)


class Call(NamedTuple):
    """A plan with where its result goes; no plan where there is nothing to multiply."""

    plan: Plan | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: torch.dtype
    device: torch.device

    def run(self, a: Tensor, b: Tensor, scale: float, into: Tensor | None, largest: Tensor | None = None) -> Tensor:
        """The product in a new tensor, or added into one; `largest` takes its largest absolute value, if in units."""
        if self.plan is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device) if into is None else into
        out = torch.empty(self.shape, dtype=self.kept, device=self.device) if into is None else into
        self.plan.launch(a, b, out, scale, largest)
        if INTERPRETED and into is None:
            return rounded(out, self.dtype) if scale == 1 else out.to(self.dtype)
        return out


@lru_cache(maxsize=PLANS)
def plan(
    operands: tuple[Any, ...],
    leaves: int,
    pieces: int,
    dtype: torch.dtype,
    scaled: bool,
    beside_collective: bool,
    added: tuple[Any, ...] | None,
) -> Call:
    """How to multiply operands that are laid out like these.

    Args:
        operands: the fields of two `Layout`s.
        added: those of the tensor that the product is added into.
    """
    a_MK, b_KN = Layout(*operands[:5]), Layout(*operands[5:])
    into = Layout(*added) if added else None
    _check(a_MK, b_KN, leaves, pieces, dtype, into)
    shape = (*a_MK.shape[:-1], b_KN.shape[-1])
    # The interpreter does not round to bfloat16 correctly: there torch does.
    kept = torch.float32 if INTERPRETED else dtype
    whole = None
    if all(shape) and a_MK.shape[-1]:
        out = into or Layout(a_MK.device, shape, _contiguous(shape), kept, 0)
        how = How(into is not None, out.dtype == torch.int64, scaled, beside_collective)
        whole = Plan(a_MK.batched, b_KN.batched.transposed, out.batched, leaves, pieces, how)
    return Call(whole, shape, dtype, kept, a_MK.device)


def constants(
    tile: Tile, leaves: int, pieces: int, tma: bool, a_BRK: Layout, b_BRK: Layout, how: How
) -> dict[str, Any]:
    """What the kernel is compiled for, in the order of its arguments."""
    return {
        "LEAVES": leaves,
        "PIECES": pieces,
        "TMA": tma,
        "A_ALONG_K": a_BRK.along_k,
        "B_ALONG_K": b_BRK.along_k,
        "ADD": how.added,
        "IN_UNITS": how.in_units,
        "SCALED": how.scaled,
        "VARIES": how.varies,
        "ALIGNED": how.aligned,
        "WIDEN": INTERPRETED and a_BRK.dtype == torch.bfloat16,
        "TILE_M": tile.m,
        "TILE_N": tile.n,
        "TILE_K": tile.k,
        "REGISTER_LEVELS": tile.register_levels,
        # One loop over tiles and k steps loads a tile's operands while the last one is stored. With two accumulators,
        # or two pieces, the assembler would wait for every wgmma.
        "FLATTEN": tma and leaves == pieces == 1,
        "GROUP": GROUP_M,
    }


def suits_tma(x_BRK: Layout, parts: int) -> bool:
    """TMA wants tensor cores' dtypes, K in equal parts, one unit stride, others of multiples of 16 bytes."""
    if x_BRK.dtype == torch.float32 or x_BRK.shape[2] % parts or x_BRK.strides[2 if x_BRK.along_k else 1] != 1:
        return False
    *apart, _ = by_leaf(x_BRK, parts)[1]
    bytes_apart = [stride * x_BRK.dtype.itemsize for stride in apart]
    return not x_BRK.misaligned and all(0 < each < 1 << 40 and each % 16 == 0 for each in bytes_apart)


def by_leaf(x_BRK: Layout, parts: int) -> tuple[list[int], list[int]]:
    """Sizes and strides of [B, parts, R, K/parts], or with the last two swapped where rows lie side by side."""
    (B, R, K), (by_B, by_R, by_K) = x_BRK.shape, x_BRK.strides
    inside = [(R, by_R), (K // parts, by_K)]
    dims = [(B, by_B), (parts, K // parts * by_K), *(inside if x_BRK.along_k else reversed(inside))]
    line = 16 // x_BRK.dtype.itemsize  # in place of the stride of a dimension of size 1, which is arbitrary
    return [size for size, _ in dims], [*(by if size > 1 else line for size, by in dims[:3]), 1]


def _described(x_BRK: Layout, parts: int, rows: int, k: int) -> Callable[[Tensor], TensorDescriptor]:
    """What makes TMA descriptors of tensors laid out so: the first is checked by Triton, others are like it."""
    sizes, strides = by_leaf(x_BRK, parts)
    block = [1, 1, rows, k] if x_BRK.along_k else [1, 1, k, rows]
    checked: dict[str, Any] = {}

    def describe(x: Tensor) -> TensorDescriptor:
        if not checked:
            first = TensorDescriptor(x, sizes, strides, block)
            checked.update({name: value for name, value in vars(first).items() if name != "base"})
            return first
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__ = {"base": x, **checked}
        return descriptor

    return describe


def _itself(x: Tensor) -> Tensor:
    return x


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*((shape[1] * shape[2],) if len(shape) == 3 else ()), shape[-1], 1)


@lru_cache
def family(device: torch.device) -> int:
    """The architecture of a GPU that products are made for, as in sm_90; `UnsupportedError` for others."""
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    if major not in FAMILIES:
        raise UnsupportedError(f"products are made for compute capability 9.x and 10.x, not {major}.{minor}")
    return 10 * major + minor


def free_processors(device: torch.device, beside_collective: bool) -> int:
    """Those that a product may take."""
    return max(1, processors(device) - (SPARED if beside_collective else 0))


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of `device`, each of which runs a program."""
    if INTERPRETED:
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(a: Layout, b: Layout, leaves: int, pieces: int, dtype: torch.dtype, into: Layout | None) -> None:
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in NAMES)
    if a.dtype != b.dtype or a.dtype not in NAMES:
        raise TypeError(
            f"products take two operands of one dtype of {', '.join(map(str, NAMES))}: {a.dtype}, {b.dtype}"
        )
    if dtype not in NAMES:
        raise TypeError(f"a product is rounded to one of {allowed}, not {dtype}")
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    dims = len(a.shape)
    if dims not in (2, 3) or len(b.shape) != dims or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a product takes [M, K]·[K, N] or [B, M, K]·[B, K, N], not {shapes}")
    if leaves < 1 or leaves & (leaves - 1):
        raise ValueError(f"leaves={leaves}: use a power of two")
    if pieces not in (1, 2) or a.shape[-1] % pieces:
        raise ValueError(f"pieces={pieces}: use 1, or 2 where K={a.shape[-1]} is even")
    if not (a.device.type == "cuda" and b.device == a.device) and not INTERPRETED:
        raise ValueError(f"both operands must be on one GPU: {a.device}, {b.device}")
    if into is None:
        return
    if into.dtype not in (torch.float32, torch.int64):
        raise TypeError(f"a product is added into float32, or in units into int64, not {into.dtype}")
    if into.shape != (*a.shape[:-1], b.shape[-1]) or into.device != a.device:
        raise ValueError(
            f"the product of {shapes} on {a.device} cannot be added into {tuple(into.shape)} on {into.device}"
        )

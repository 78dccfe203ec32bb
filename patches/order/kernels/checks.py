"""What is tried on a device before its first product: that bits depend on operands alone, and whose bits they are.

Every tile, layout, number of pieces and way to load gives the bits of one plain kernel (loads by pointers, one tile);
so do added, batched and scaled results, single rows, leaves that are added by torch, and fewer programs. Products have
more tiles than the device has processors, so that programs go on to a second one, and more k steps a leaf than stages
of loads, so that buffers are used again; each is launched several times, so that a race has chances to show.

On an H100 that is some 45 kernels, which take Triton about a minute to compile once (they are then on disk, and most of
them a training step needs as well), and 130 launches of about 0.2 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from patches.contract import UnsupportedError
from patches.order.grid import in_units
from patches.order.kernels.gemm import add_product_in_units, product
from patches.order.kernels.golden import class_of
from patches.order.kernels.grouped import grouped_product
from patches.order.kernels.pairs import INTERPRETED
from patches.order.kernels.plans import How, Plan, family, layout_of, processors
from patches.order.kernels.tiles import Tile, tiles_of
from patches.order.tree import cuts, tree_sum

__all__ = ["check"]

LEAVES = 4 if INTERPRETED else 8  # above two levels of registers there is scratch
# Tiles of the largest kind for every processor, K of a leaf's piece (6 steps; there are up to 4 stages), launches.
ROUNDS, LENGTH, TIMES = (1.2, 16, 1) if INTERPRETED else (2.2, 6 * 64, 3)

Try = tuple[str, Callable[[], Tensor], Tensor]


def check(device: torch.device) -> None:
    """Compare, on this very `device`, bits that must not depend on tiles, loads, or what else is in a call.

    Raises:
        UnsupportedError: they do, or it is no GPU that products are made for.
    """
    family(device)
    class_of(device)
    a_MK, b_KN = _operands(device)
    for tries in (_cuts, _tiles, _results):
        for what, call, expected in tries(a_MK, b_KN):
            for _ in range(TIMES):
                _same_bits(what, call(), expected)


def _operands(device: torch.device) -> tuple[Tensor, Tensor]:
    """[M, K] and [K, N], along K, of ragged tiles; interpreted, of whole numbers, whose sums NumPy cannot round."""
    side = math.ceil(math.sqrt(ROUNDS * processors(device)))
    generator = torch.Generator("cpu").manual_seed(0)

    def rows(count: int) -> Tensor:
        shape = (count, 2 * LEAVES * LENGTH)
        if INTERPRETED:
            return torch.randint(-7, 8, shape, generator=generator, device="cpu").bfloat16()
        return torch.randn(shape, generator=generator, device="cpu").to(device, torch.bfloat16)

    return rows(128 * side - 40), rows(256 * side - 24).T


def _cuts(a_MK: Tensor, b_KN: Tensor) -> Iterator[Try]:
    """The tree, whole and in parts; a row; addresses out of TMA's reach."""
    plain = product(_unaligned(a_MK), b_KN, LEAVES)
    for what, count in (("a leaf alone", LEAVES), ("half of the leaves", 2)):
        parts = cuts(a_MK.shape[1], count)
        yield what, lambda count=count, parts=parts: tree_sum(  # type: ignore[misc]
            [product(a_MK[:, lo:hi], b_KN[lo:hi], LEAVES // count) for lo, hi in parts]
        ), plain  # fmt: skip
    yield "a row alone", lambda: product(a_MK[7:8], b_KN, LEAVES), plain[7:8]
    yield "fewer programs", lambda: product(a_MK, b_KN, LEAVES, beside_collective=True), plain


def _tiles(a_MK: Tensor, b_KN: Tensor) -> Iterator[Try]:
    """Every layout, number of pieces and tile that layers launch, by TMA."""
    one, tree = (1, 1), (LEAVES, 1)
    kinds = {"abᵀ": (one, tree), "ab": (one, tree, (1, 2), (LEAVES, 2)), "aᵀb": (one,), "aᵀbᵀ": (one,)}
    plain = {kind: product(_unaligned(a_MK), b_KN, *kind) for kind in kinds["ab"]}
    for layout, some in kinds.items():
        a = a_MK.T.contiguous().T if "aᵀ" in layout else a_MK
        b = b_KN if "bᵀ" in layout else b_KN.contiguous()
        for leaves, pieces in some:
            for tile in tiles_of(a.dtype, leaves, True):
                what = f"{layout} of {leaves} leaves and {pieces} pieces in tiles of {tile.m}x{tile.n}"
                call = lambda a=a, b=b, of=(leaves, pieces, tile): _tiled(a, b, of[0], of[1], of[2])  # noqa: E731
                yield what, call, plain[leaves, pieces]


def _results(a_MK: Tensor, b_KN: Tensor) -> Iterator[Try]:
    """What becomes of a root."""
    plain = product(_unaligned(a_MK), b_KN)
    a = a_MK.T.contiguous().T
    before = (plain.flatten().roll(1).view(plain.shape)).contiguous()
    for tile in tiles_of(a.dtype, 1, True):
        what = f"a product added in tiles of {tile.m}x{tile.n}"
        call = lambda tile=tile: _tiled(a, b_KN.contiguous(), 1, 1, tile, before.clone())  # noqa: E731
        yield what, call, before + plain
    yield "a product added in units", lambda: _in_units(a, b_KN.contiguous()), in_units(plain)
    yield "a rounded result", lambda: product(a_MK, b_KN, dtype=torch.bfloat16).float(), plain.bfloat16().float()
    scaled = plain.mul(0.3).bfloat16().float()
    yield "a scaled result", lambda: product(a_MK, b_KN, dtype=torch.bfloat16, scale=0.3).float(), scaled
    halves = a_MK.unflatten(0, (2, -1)), torch.stack([b_KN.T, b_KN.T]).mT
    rows = [1, len(a_MK) - 1]
    yield "several products in one launch", lambda: grouped_product(a_MK, [b_KN, b_KN], rows), plain
    yield "a batch", lambda: product(*halves).flatten(0, 1), plain


def _tiled(a: Tensor, b: Tensor, leaves: int, pieces: int, tile: Tile, into: Tensor | None = None) -> Tensor:
    """A product by TMA in such tiles, whatever suits its shape."""
    out = torch.empty(a.shape[0], b.shape[1], device=a.device) if into is None else into
    layouts = layout_of(a), layout_of(b).transposed, layout_of(out)
    plan = Plan(*layouts, leaves, pieces, How(added=into is not None), tile)
    assert plan.by_tma and plan.rounds > 1, "the check does not check what it is for"
    plan.launch(a, b, out, 1.0)
    return out


def _in_units(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int64, device=a.device)
    add_product_in_units(total, torch.zeros((), dtype=torch.float64, device=a.device), a, b)
    return total


def _unaligned(x_RC: Tensor) -> Tensor:
    """The same values out of TMA's reach."""
    return torch.cat([x_RC[:, :1], x_RC], 1)[:, 1:]


def _same_bits(what: str, found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found.view(torch.int32), expected.view(torch.int32)):
        raise UnsupportedError(
            f"products on this GPU do not keep the contract: {what} gives other bits (sm_{family(found.device)}, "
            f"Triton {triton.__version__}). Please report it, with the output of `make gpu`"
        )

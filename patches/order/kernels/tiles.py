"""How a product is cut for the machine: tiles follow its shape, and no bit follows them.

Bits depend on groups of 16 along K, counted from where a leaf starts (`tensor_core`); a tile cuts M and N, its k step
is whole groups, and a program takes any tiles. So the tile is the one whose last round of tiles leaves the fewest
processors idle: of 132, 96 tiles of 128x256 keep 73 %, 384 of 128x64 keep 97 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Tile", "tile_of", "tiles_of"]


@dataclass(frozen=True)
class Tile:
    """A program's share of a result, and how it is computed.

    Attributes:
        register_levels: levels of the tree whose pending sums wait in registers.
        speed: of its inner loop, relative to the largest tile's; estimated from the bytes that it loads per product.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    register_levels: int
    speed: float = 1.0


_BY_TMA = {
    "one leaf": (Tile(128, 256, 64, 8, 4, 0), Tile(128, 128, 64, 8, 4, 0, 0.92), Tile(128, 64, 64, 4, 4, 0, 0.75)),
    "tree": (Tile(128, 128, 64, 8, 3, 2), Tile(128, 64, 64, 8, 4, 2, 0.8)),
}
_BY_POINTERS = (Tile(128, 128, 64, 8, 3, 1),)  # whose addresses take registers
_FLOAT32 = (Tile(64, 64, 32, 4, 2, 1),)


def tiles_of(dtype: torch.dtype, leaves: int, tma: bool) -> tuple[Tile, ...]:
    """The tiles for operands of `dtype`, one leaf or several, loads by TMA or by pointers; the largest first."""
    if dtype == torch.float32:
        return _FLOAT32
    return _BY_TMA["one leaf" if leaves == 1 else "tree"] if tma else _BY_POINTERS


def tile_of(dtype: torch.dtype, leaves: int, tma: bool, size: tuple[int, int, int], processors: int) -> Tile:
    """The tile that is expected to take the least time for `size`: batches, M and N."""
    batches, m, n = size

    def time(tile: Tile) -> float:
        rounds = -(-batches * -(-m // tile.m) * -(-n // tile.n) // processors)
        return rounds * tile.m * tile.n / tile.speed

    return min(tiles_of(dtype, leaves, tma), key=time)

"""Rounding, imitated: values moved to a neighbouring number of their own dtype, or left where they are.

A reference that runs again with every module's output, every gradient between modules and every parameter's
gradient nudged shows, tensor by tensor, what one rounding per operation grows into. Ranks that hold the same values
nudge them alike.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

from tpcheck.files.names import NUDGED

__all__ = ["REDRAWN", "Nudge", "nudge", "nudged_folder", "nudged_folders", "redrawn", "spawn"]

REDRAWN = 101  # from this seed on, a nudged run's dropout drops other elements, too

# A sum of products is rounded once to bfloat16 or float16, but at every addition to float32 and float64: there, an
# order of a few hundred summands is worth several units in the last place.
UNITS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 4, torch.float64: 4}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def nudged_folder(path: Path, seed: int) -> Path:
    """Where the run at `path` is traced again, nudged by `seed`."""
    return path / f"{NUDGED}{seed}"


def nudged_folders(path: Path) -> list[Path]:
    """Those in `path`, by whatever seeds."""
    return sorted(folder for folder in path.glob(f"{NUDGED}*") if folder.is_dir())


def spawn(seed: int, *place: object) -> torch.Generator:
    """The random numbers of a run's `seed` at a place in it, the same on every rank."""
    return torch.Generator().manual_seed(zlib.crc32(repr((seed, *place)).encode()))


def nudge(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`x` with each element moved by at most `UNITS` in the last place, either way; zeros and infinities stay."""
    units = UNITS[x.dtype]
    bits = x.detach().contiguous().view(INTEGERS[x.element_size()])
    # Zero is drawn most: rounding leaves many of bfloat16's elements as they are.
    draw = torch.randint(-2 * units, 2 * units + 1, x.shape, generator=generator, dtype=torch.int8)
    steps = torch.div(draw, 2, rounding_mode="trunc").to(x.device, bits.dtype)
    moved = (bits + steps).view(x.dtype)
    return torch.where((x.detach() != 0) & torch.isfinite(x.detach()) & torch.isfinite(moved), moved, x.detach())


def redrawn(x: torch.Tensor, p: float, generator: torch.Generator) -> torch.Tensor:
    """Dropout of `x` by random numbers of its own."""
    kept = torch.rand(x.shape, generator=generator).to(x.device) >= p
    return x * (kept / (1 - p)).to(x.dtype)


class Nudge(torch.autograd.Function):
    """A rounding in the forward direction; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return nudge(x, generator)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None

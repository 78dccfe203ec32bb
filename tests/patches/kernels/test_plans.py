"""Tiles, programs and plans: they follow from the shape, are made once, and no bit follows them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.order.kernels import gemm_kernel, plans
from patches.order.kernels.gemm import product
from patches.order.kernels.tensor_core import K16_25
from patches.order.kernels.tiles import Tile, tile_of, tiles_of
from tests.patches.kernels.gemm_operands import operands, replan
from tests.support.bits import assert_same_bits
from tests.support.operands import exact_leaves


def assert_models_bits(y, a, b, leaves):
    """At the borders of tiles and some places between, on which an element's bits cannot depend."""
    rows, columns = ([i for i in range(size) if i % 64 in (0, 1, 37, 63)] for size in y.shape)
    assert_same_bits(y[rows][:, columns].cpu(), K16_25.product(a[rows], b[:, columns], leaves))


TILES = [(1, tile) for tile in tiles_of(torch.bfloat16, 1, True)] + [
    (4, tile) for tile in tiles_of(torch.bfloat16, 4, True)
]


@pytest.mark.parametrize(("leaves", "tile"), TILES, ids=lambda x: f"{x.m}x{x.n}" if isinstance(x, Tile) else f"{x}")
def test_tile_has_no_say(leaves, tile, device, monkeypatch):
    """Every tile's bits are the model's, on operands whose sums within a leaf are exact (elsewhere NumPy's are not)."""
    a, b = (x.to(device) for x in exact_leaves(200, 256, 272, leaves, 1, torch.bfloat16))
    chosen = []
    replan(monkeypatch, tile_of=lambda *_: chosen.append(tile) or tile)
    assert_models_bits(product(a, b, leaves), a, b, leaves)
    assert_models_bits(product(a, b, leaves, into=torch.zeros(200, 272, device=device)), a, b, leaves)
    assert chosen == [tile, tile]


@pytest.mark.parametrize("programs", (1, 2, 100))
def test_number_of_programs_has_no_say(programs, device, monkeypatch):
    a, b = (x.to(device) for x in exact_leaves(300, 256, 200, 4, 1, torch.bfloat16))
    replan(monkeypatch, processors=lambda device: programs)
    assert_models_bits(product(a, b, 4), a, b, 4)


def test_fewer_programs_run_beside_a_collective_and_give_the_same_bits(device, monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid[0])
            return kernel[grid]

    a, b = operands(600, 500, 64, device, torch.float16)
    kernel = plans.kernel
    replan(monkeypatch, kernel=Kernel(), processors=lambda device: 5, SPARED=2)
    whole = product(a, b)
    assert_same_bits(product(a, b, beside_collective=True), whole)
    assert grids == [5, 3]


def test_tile_follows_the_shape_so_that_few_processors_idle():
    def chosen(m, n, leaves=1):
        tile = tile_of(torch.bfloat16, leaves, True, (1, m, n), 132)
        return tile.m, tile.n

    assert chosen(8192, 24576) == (128, 256)
    assert chosen(4096, 512) == (128, 128)  # 128 tiles on 132 processors, not 64
    assert chosen(2048, 512) == (128, 64)
    assert chosen(8192, 4096, leaves=8) == (128, 128)
    assert chosen(2048, 512, leaves=8) == (128, 64)


def test_plan_is_made_once_for_operands_laid_out_alike(device, monkeypatch):
    made = []
    monkeypatch.setattr(plans, "tile_of", lambda *args: made.append(args) or tile_of(*args))
    for _ in range(3):
        a, b = operands(40, 40, 64, device)
        product(a, b)
    assert len(made) == 1
    product(a.T.contiguous().T, b)
    assert len(made) == 2


def test_second_launch_goes_straight_to_the_compiled_kernel(device, monkeypatch):
    """With all that Triton passed to it at the first: arguments, then what it was compiled for, in that order."""
    asked, launched = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append((grid, arguments))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: asked.append((grid, arguments, options)) or Compiled()

    replan(monkeypatch, kernel=Kernel())
    a, b = operands(48, 64, 64, device)
    for _ in range(3):
        product(a, b, leaves=2)
    ((grid, arguments, options),) = asked
    names = gemm_kernel.kernel.arg_names
    assert [*options][:-2] == names[len(arguments) :] and [*options][-2:] == ["num_warps", "num_stages"]
    assert len(launched) == 2
    for place, given in launched:
        assert place == grid and given[3:] == (*arguments[3:], *[*options.values()][:-2])
        for mine, first in zip(given[:2], arguments[:2], strict=True):
            assert mine.base.data_ptr() == first.base.data_ptr() and {**vars(mine), "base": 0} == {
                **vars(first),
                "base": 0,
            }

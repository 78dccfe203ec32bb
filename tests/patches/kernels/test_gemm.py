"""Products of `kernels.gemm`: right against the exact product, and the same bits however they are cut or laid out.

Without a GPU, Triton's interpreter runs the kernel on NumPy. It proves what is index arithmetic: which elements are
multiplied, masked, added into which leaf, in which order leaves meet, where results are stored. It says nothing
about the order inside one k step (NumPy's), the tensor cores' arithmetic, races, layouts and speed. Its own bfloat16
is wrong in two ways (products of the bits as integers, conversions that do not round to nearest), so there the kernel
widens operands itself and torch rounds the result. On a GPU the same tests run on the compiled kernel.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.contract import UnsupportedError
from patches.order.exact.products import exact_product, tree_of_products
from patches.order.kernels import checks, gemm_kernel, plans, provenance
from patches.order.kernels.gemm import product
from patches.order.kernels.tensor_core import K16_25
from patches.order.kernels.tiles import Tile, tile_of, tiles_of
from patches.order.tree import cuts, tree_sum
from tests.support.bits import assert_same_bits
from tests.support.operands import exact_leaves

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("ab", "abᵀ", "aᵀb", "aᵀbᵀ")  # dgrad, forward, wgrad, neither operand as the tensor cores like it


def operands(M, N, K, device, dtype=torch.bfloat16, layout="abᵀ", batch=()):
    """Random [*batch, M, K] and [*batch, K, N]; ᵀ says that K is, or is not, the dimension that lies side by side."""
    a = torch.randn(*batch, M, K) if "aᵀ" not in layout else torch.randn(*batch, K, M).mT
    b = torch.randn(*batch, N, K).mT if "bᵀ" in layout else torch.randn(*batch, K, N)
    return a.to(device, dtype), b.to(device, dtype)


def assert_right(y, a, b, leaves=1, pieces=1):
    """float32 accumulation in any order: (K + leaves)·2⁻²⁴·Σ|ab|; twice that, as tensor cores may cut, not round."""
    exact = tree_of_products(a.cpu(), b.cpu(), leaves, pieces).double()
    sizes = exact_product(a.cpu().abs(), b.cpu().abs()).double()
    bound = (a.shape[-1] + leaves) * 2.0**-23 * sizes
    assert ((y.cpu().double() - exact).abs() <= bound).all()


@pytest.fixture(autouse=True)
def _forget_plans():
    plans.plan.cache_clear()
    yield
    plans.plan.cache_clear()


def replan(monkeypatch, **changes):
    """From now on plans are made with these in place of functions and numbers of `plans`."""
    for name, change in changes.items():
        monkeypatch.setattr(plans, name, change)
    plans.plan.cache_clear()


@pytest.fixture(params=(True, False), ids=("tma", "pointers"))
def loads(request, monkeypatch):
    """Both ways to load, where the operands leave the choice."""
    if not request.param:
        replan(monkeypatch, _suits_tma=lambda *_: False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("loads")
def test_product_is_right_in_every_layout_and_dtype(layout, dtype, device):
    a, b = operands(136, 264, 256, device, dtype, layout)
    assert_right(product(a, b, leaves=2), a, b, leaves=2)


@pytest.mark.parametrize("pieces", (1, 2))
@pytest.mark.parametrize("leaves", (1, 2, 4, 8, 16))
def test_product_is_right_at_every_number_of_leaves(leaves, pieces, device):
    a, b = operands(72, 80, 2 * 64 * leaves, device, layout="ab")
    assert_right(product(a, b, leaves, pieces), a, b, leaves, pieces)


@pytest.mark.parametrize("K", (1, 7, 65, 250, 1000))
@pytest.mark.parametrize(("leaves", "pieces"), ((1, 1), (8, 1), (4, 2)))
def test_product_is_right_at_ragged_sizes(K, leaves, pieces, device):
    a, b = operands(129, 131, K * pieces, device)
    assert_right(product(a, b, leaves, pieces), a, b, leaves, pieces)


def test_product_is_right_with_more_tiles_than_programs(device):
    a, b = operands(1300, 1300, 64, device, torch.float16)
    assert_right(product(a, b), a, b)


@pytest.mark.parametrize(("layout", "leaves"), (("abᵀ", 1), ("ab", 4), ("aᵀb", 1), ("aᵀbᵀ", 2)))
def test_every_split_of_rows_and_columns_has_same_bits(layout, leaves, device):
    a, b = operands(300, 270, 512, device, layout=layout)
    whole = product(a, b, leaves)
    for rows, columns in ((slice(0, 1), slice(0, 270)), (slice(150, 300), slice(135, 270)), (slice(7, 9), slice(3, 5))):
        assert_same_bits(product(a[rows], b[:, columns], leaves), whole[rows, columns])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", (8 * 64, 8 * 65 + 2))
def test_tree_over_parts_of_the_leaves_has_same_bits(K, dtype, device):
    a, b = operands(130, 140, K, device, dtype)
    whole = product(a, b, leaves=8)
    for parts in (8, 2):
        roots = [product(a[:, lo:hi], b[lo:hi], leaves=8 // parts) for lo, hi in cuts(K, parts)]
        assert_same_bits(tree_sum(roots), whole)


def test_gated_leaves_are_gate_then_up_in_one_accumulator(device):
    a, b = operands(130, 140, 2 * 4 * 64, device, layout="ab")
    a_TPK, b_PKN = a.unflatten(1, (2, -1)), b.unflatten(0, (2, -1))
    gated = [(a_TPK[:, :, lo:hi].flatten(1), b_PKN[:, lo:hi].flatten(0, 1)) for lo, hi in cuts(4 * 64, 4)]
    assert_same_bits(product(a, b, leaves=4, pieces=2), tree_sum([product(x, y) for x, y in gated]))


@pytest.mark.parametrize(("leaves", "pieces"), ((1, 1), (4, 1), (2, 2)))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("K", (512, 4 * 72))
def test_tma_and_pointers_have_same_bits(K, layout, leaves, pieces, device, monkeypatch):
    a, b = operands(136, 264, K, device, layout=layout)
    suits_tma, chosen = plans._suits_tma, []
    replan(monkeypatch, _suits_tma=lambda *args: chosen.append(suits_tma(*args)) or chosen[-1])
    by_tma = product(a, b, leaves, pieces)
    assert chosen == [True, True]
    replan(monkeypatch, _suits_tma=lambda *_: False)
    assert_same_bits(product(a, b, leaves, pieces), by_tma)


@pytest.mark.parametrize("layout", ("abᵀ", "aᵀb"))
def test_operands_of_any_strides_have_the_bits_of_their_copies(layout, device):
    a, b = operands(150, 140, 4 * 64, device, layout=layout)
    expected = product(a, b, leaves=4)
    for wider in ((1, 3), (2, 1), (3, 2)):
        strided = []
        for x in (a, b):
            buffer = torch.full((x.shape[0] * wider[0], x.shape[1] * wider[1]), math.nan, dtype=x.dtype, device=device)
            view = buffer[:: wider[0], :: wider[1]]
            strided.append(view.copy_(x))
        assert_same_bits(product(*strided, leaves=4), expected)
    row, column = torch.randn(2, 4 * 64, device=device).to(a.dtype)
    stretched = row.expand(150, -1), column.unsqueeze(1).expand(-1, 140)
    assert_same_bits(product(*stretched, leaves=4), product(*(x.contiguous() for x in stretched), leaves=4))


@pytest.mark.parametrize("K", (4 * 64, 4 * 50 + 1))
def test_nothing_outside_the_operands_is_touched(K, device):
    """0·NaN is NaN: masks must hold on both operands."""
    a, b = operands(130, 140, K, device)
    inner = slice(64, 64 + K)
    a_padded, b_padded = (torch.full((256, K + 128), math.nan, dtype=a.dtype, device=device) for _ in range(2))
    a_padded[8:138, inner], b_padded[16:156, inner] = a, b.T
    y = product(a_padded[8:138, inner], b_padded[16:156, inner].T, leaves=4)
    assert_same_bits(y, product(a, b, leaves=4))


def test_infinities_and_nans_stay_in_their_row_and_column(device):
    a, b = operands(140, 140, 128, device)
    expected = product(a, b, leaves=2)
    a[3, 5], b[77, 9] = math.nan, math.inf
    y = product(a, b, leaves=2)
    kept = torch.ones_like(y, dtype=torch.bool)
    kept[3], kept[:, 9] = False, False
    assert_same_bits(y[kept], expected[kept])
    assert not y[~kept].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("K", (64, 40))
def test_batch_has_the_bits_of_its_products_one_by_one(K, layout, device):
    a, b = operands(132, 72, K, device, layout=layout, batch=(3,))
    expected = torch.stack([product(a[i], b[i], dtype=torch.bfloat16) for i in range(3)])
    assert_same_bits(product(a, b, dtype=torch.bfloat16), expected)


def test_batch_of_interleaved_heads_needs_no_copy(device):
    """[s, b·h, d], as attention holds them: products over d, and over s."""
    q, k = (torch.randn(72, 6, 64, device=device).bfloat16().transpose(0, 1) for _ in range(2))
    scores = product(q, k.mT, dtype=torch.bfloat16)
    assert_same_bits(scores, product(q.contiguous(), k.contiguous().mT, dtype=torch.bfloat16))
    assert_same_bits(product(scores, k), product(scores, k.contiguous()))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_is_one_multiplication_of_the_root(dtype, device):
    a, b = operands(70, 90, 64, device, dtype)
    a[1] = 0
    for scale in (0.08838834764831845, -3.0):
        assert_same_bits(product(a, b, 2, dtype=dtype, scale=scale), product(a, b, 2).mul_(scale).to(dtype))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_root_is_rounded_once(dtype, device):
    a, b = operands(130, 140, 512, device, dtype)
    assert_same_bits(product(a, b, 4, dtype=dtype), product(a, b, 4).to(dtype))


@pytest.mark.parametrize("leaves", (1, 4))
def test_product_is_added_into_float32_in_one_addition(leaves, device):
    a, b = operands(130, 140, 256, device, layout="aᵀb")
    before = torch.randn(140, 260, device=device).T[::2]
    into = before.clone(memory_format=torch.preserve_format)
    assert product(a, b, leaves, into=into) is into
    assert_same_bits(into, before + product(a, b, leaves))


def test_zeros_are_positive(device):
    a, b = operands(40, 40, 64, device, torch.float16)
    a[1], b[:, 2] = -0.0, -0.0
    a[3], b[:, 4] = -6e-8, 6e-8
    y = product(a, b, dtype=torch.float16)
    assert (y[1] == 0).all() and (y[:, 2] == 0).all() and y[3, 4] == 0
    assert not y[y == 0].signbit().any()


def test_empty_products(device):
    for M, N, K in ((0, 5, 3), (5, 0, 3), (5, 3, 0)):
        a, b = operands(M, N, K, device)
        assert_same_bits(product(a, b, leaves=4), torch.zeros(M, N, device=device))
    into = torch.ones(5, 3, device=device)
    assert_same_bits(product(a, b, into=into), torch.ones(5, 3, device=device))


def test_bad_operands_are_refused(device):
    a, b = operands(4, 5, 6, device)
    for error, arguments in (
        (TypeError, {"a_MK": a.double(), "b_KN": b.double()}),
        (TypeError, {"b_KN": b.half()}),
        (TypeError, {"dtype": torch.float64}),
        (TypeError, {"into": torch.zeros(4, 5, device=device, dtype=torch.bfloat16)}),
        (ValueError, {"into": torch.zeros(5, 4, device=device)}),
        (ValueError, {"b_KN": b.T}),
        (ValueError, {"a_MK": a.unsqueeze(0)}),
        (ValueError, {"leaves": 3}),
        (ValueError, {"pieces": 3}),
        (ValueError, {"a_MK": a[:, :5], "b_KN": b[:5], "pieces": 2}),
    ):
        with pytest.raises(error):
            product(**{"a_MK": a, "b_KN": b, **arguments})


def test_provenance_tells_what_bits_depend_on_and_no_tile(device):
    facts = provenance(device)
    assert facts["groups"] == "16 of K from the start of a leaf" and facts["class"] and len(facts["functions"]) == 16
    assert not facts.keys() & {"k_step", "family", "tile"}


def test_check_finds_products_that_depend_on_what_else_is_in_a_call(monkeypatch, device):
    checks.check(device)
    tiled = checks._tiled
    smaller = tiles_of(torch.bfloat16, 1, True)[-1]
    for wrong, name, is_broken in (
        ("a leaf alone", "product", lambda a, b, leaves=1, *_, **__: leaves == 1),
        (
            "abᵀ of 1 leaves and 1 pieces in tiles of 128x64",
            "_tiled",
            lambda *args: args[4] == smaller and args[1].stride(0) == 1,
        ),
    ):
        right = product if name == "product" else tiled

        def broken(*args, right=right, is_broken=is_broken, **kwargs):
            return right(*args, **kwargs) * (1 + 2.0**-23 if is_broken(*args, **kwargs) else 1)

        with monkeypatch.context() as patch:
            patch.setattr(checks, name, broken)
            with pytest.raises(UnsupportedError, match=wrong):
                checks.check(device)


def test_check_refuses_a_gpu_that_products_are_not_made_for(monkeypatch):
    monkeypatch.setattr(plans, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UnsupportedError, match=r"9.x and 10.x, not 8.0"):
        checks.check(torch.device("cuda", 7))


@pytest.mark.gpu
def test_offsets_beyond_31_bits(device):
    a = torch.randn(3, 1 << 30, dtype=torch.bfloat16, device=device)[:, :256]
    b = torch.randn(3, 1 << 30, dtype=torch.bfloat16, device=device)[:, :256].T
    for leaves, K in ((1, 256), (4, 256), (4, 250)):
        x, y = a[:, :K], b[:K]
        assert_same_bits(product(x, y, leaves), product(x.contiguous(), y.contiguous(), leaves))

"""The tensor core on paper: what its bits depend on, and what not; the golden bits; kernels held to it.

The interpreter multiplies by NumPy's float32, whose sums within a leaf round otherwise than a tensor core's, so there
kernels and model can be compared only where every leaf's sum is exact: which elements belong to which leaf, in which
order roots meet and how they are rounded. Cutting, and groups of 16, show on a GPU alone: by the golden bits.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.order.kernels import golden
from patches.order.kernels.gemm import product
from patches.order.kernels.tensor_core import K16_25, Model
from tests.support.bits import assert_same_bits
from tests.support.operands import exact_leaves

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16)
seeds = st.integers(0, 2**31)


def operands(seed: int, m: int, k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers whose exponents spread over 12 binades, a tenth of them zero."""
    g = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-6, 7, shape, generator=g).float())
        return x.masked_fill(torch.rand(shape, generator=g) < 0.1, 0).to(dtype)

    return make(m, k), make(k, n)


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from(DTYPES), st.integers(1, 90), st.sampled_from((16, 64, 128)))
def test_padding_with_zeros_to_any_k_step_changes_no_bit(seed, dtype, k, step):
    a, b = operands(seed, 6, k, 5, dtype)
    padding = -k % step
    assert_same_bits(K16_25.product(F.pad(a, (0, padding)), F.pad(b, (0, 0, 0, padding))), K16_25.product(a, b))


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(DTYPES), st.sampled_from((16, 64, 128)))
def test_k_step_of_whole_groups_changes_no_bit(seed, dtype, step):
    a, b = operands(seed, 6, 256, 5, dtype)
    acc = torch.zeros(6, 5)
    for k in range(0, 256, step):
        for group in range(k, k + step, 16):
            acc = K16_25.mma(a[:, group : group + 16], b[group : group + 16], acc)
    assert_same_bits(acc, K16_25.product(a, b))


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(DTYPES), st.integers(0, 5), st.integers(0, 4))
def test_element_depends_on_its_own_row_and_column_alone(seed, dtype, row, column):
    a, b = operands(seed, 6, 100, 5, dtype)
    whole = K16_25.product(a, b, leaves=2)
    alone = K16_25.product(a[row : row + 1], b[:, column : column + 1], leaves=2)
    assert_same_bits(alone, whole[row : row + 1, column : column + 1])


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(DTYPES), st.permutations(range(16)))
def test_order_within_a_group_changes_no_bit(seed, dtype, order):
    a, b = operands(seed, 6, 64, 5, dtype)
    shuffled = torch.cat([torch.tensor(order) + 16 * group for group in range(4)])
    assert_same_bits(K16_25.product(a[:, shuffled], b[shuffled]), K16_25.product(a, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_that_begin_8_later_give_other_bits(dtype):
    """That the tests above can fail."""
    a, b = operands(0, 20, 256, 20, dtype)
    shifted = K16_25.product(F.pad(a, (8, 8)), F.pad(b, (0, 0, 8, 8)))
    assert (shifted != K16_25.product(a, b)).float().mean() > 0.3


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from(DTYPES), st.integers(1, 100))
def test_each_group_loses_at_most_what_is_cut(seed, dtype, k):
    """17 terms cut at 2^(top - 25) and a sum cut to 24 bits: relative to the largest |term| and partial sum."""
    a, b = operands(seed, 6, k, 5, dtype)
    exact, sizes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    groups = math.ceil(k / 16)
    assert ((K16_25.product(a, b).double() - exact).abs() <= groups * (17 * 2.0**-25 + 2.0**-23) * sizes).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_cuts_towards_zero(dtype):
    """1 + 2^-26 is 1 and -1 - 2^-26 is -1; 1 - 2^-26 too, for each term is cut by itself; 2 cut terms are none."""
    one, small = 1.0, 2.0**-13
    row = torch.tensor([[one, small], [one, -small], [-one, -small]], dtype=dtype)
    column = torch.tensor([[one], [small]], dtype=dtype)
    assert K16_25.product(row, column).flatten().tolist() == [1.0, 1.0, -1.0]
    kept = Model(bits=26).product(row, column).flatten().tolist()
    assert kept == [1.0, 1 - 2.0**-24, -1.0]  # 1 - 2^-26 cut to 24 bits


def test_infinities_nans_and_subnormal_numbers():
    a = torch.tensor([[math.inf, 1], [math.nan, 1], [math.inf, -math.inf], [0, 2.0**-24]], dtype=torch.float16)
    y = K16_25.product(a, torch.ones(2, 1, dtype=torch.float16)).flatten()
    assert y[0] == math.inf and y[1].isnan() and y[2].isnan() and y[3] == 2.0**-24
    large = torch.full((1, 2), 2.0**127, dtype=torch.bfloat16)
    assert K16_25.product(large, large.new_full((2, 1), 1.0)).item() == math.inf
    least = torch.tensor([[2.0**-133, 2.0**-133]], dtype=torch.bfloat16)
    assert K16_25.product(least, torch.ones(2, 1, dtype=torch.bfloat16)).item() == 2.0**-132


def test_golden_bits_are_the_models():
    assert golden.digests(K16_25.product, CPU) == golden.GOLDEN


@pytest.mark.parametrize("other", (Model(8), Model(32), Model(16, 24), Model(16, 26)), ids=lambda model: model.name)
def test_every_golden_case_tells_other_tensor_cores_apart(other):
    found = golden.digests(other.product, CPU)
    assert found.keys() == golden.GOLDEN.keys()
    assert all(found[case] != golden.GOLDEN[case] for case in found)


def test_golden_bits_tell_another_cut_of_leaves_and_the_order_of_roots_apart():
    def swapped(a, b, leaves, pieces):
        return K16_25.product(a.roll(64, 1), b.roll(64, 0), leaves, pieces)

    found = golden.digests(swapped, CPU)
    assert all(found[case] != golden.GOLDEN[case] for case in found)


def test_a_device_is_of_the_class_whose_bits_it_gives(monkeypatch):
    monkeypatch.setattr(golden, "INTERPRETED", False)
    monkeypatch.setattr(golden, "family", lambda device: 103)
    for model, name in ((K16_25, "k16-25"), (Model(16, 26), "sm_103")):
        golden.class_of.cache_clear()
        monkeypatch.setattr(golden, "product", model.product)
        assert golden.class_of(CPU) == name
    golden.class_of.cache_clear()


@pytest.mark.gpu
def test_this_device_gives_the_golden_bits(device):
    assert golden.digests(product, device) == golden.GOLDEN


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "leaves", "pieces"), ((512, 8, 1), (1000, 4, 1), (1024, 8, 2), (264, 1, 1)))
def test_kernels_have_the_models_bits_where_leaves_are_exact(k, leaves, pieces, dtype, device):
    a, b = exact_leaves(70, k, 40, leaves, pieces, dtype)
    want = K16_25.product(a, b, leaves, pieces)
    assert_same_bits(product(a.to(device), b.to(device), leaves, pieces), want)
    if leaves > 1:
        assert (want.double() != a.double() @ b.double()).any(), "roots were not rounded"

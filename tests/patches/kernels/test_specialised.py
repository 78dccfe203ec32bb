"""The warp-specialised kernel on a model of Gluon: the tensor core's bits, whatever happens first; and on a GPU.

What the model leaves out (layouts, warps of a partition, memory's order) shows on a GPU alone, where the tests marked
`gpu` compare the compiled kernel with `gemm_kernel`.
"""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")
pytest.importorskip("patches.order.kernels.specialised", reason="this Triton's Gluon is another", exc_type=ImportError)

from patches.order.kernels import specialised, specialised_kernel
from patches.order.kernels.gemm import fields_of, product
from patches.order.kernels.tensor_core import K16_25
from tests.patches.kernels.gemm_operands import operands
from tests.support.bits import assert_same_bits
from tests.support.gluon_model import Descriptor, Pointer, Stuck, run

TILE_M, TILE_N, TILE_K = 8, 4, 32  # a model's are small
SIZES = {"STAGES": 3, "ACCUMULATORS": 4, "GROUP": 2, "WARPS": 8, "TILE_M": TILE_M, "TILE_N": TILE_N, "TILE_K": TILE_K}


def modelled(a_MK, b_KN, leaves, pieces, along_k, wgmma, dtype, seed, programs=2, kernel=specialised_kernel.kernel):
    """The kernel's result, in memory that is not written elsewhere."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    parts = leaves * pieces
    a = Descriptor(a_MK.unflatten(1, (parts, -1)).transpose(0, 1), [1, TILE_M, TILE_K])
    b_parts = b_KN.unflatten(0, (parts, -1))
    b = Descriptor(b_parts.mT, [1, TILE_N, TILE_K]) if along_k else Descriptor(b_parts, [1, TILE_K, TILE_N])
    out = torch.full((M, N + 1), torch.nan, dtype=dtype)
    tiles_m, tiles_n = -(-M // TILE_M), -(-N // TILE_N)
    scratch = torch.full((programs * 2 * TILE_M * TILE_N,), torch.nan)
    numbers = (M, N, -(-K // parts // TILE_K), tiles_m, tiles_n, tiles_m * tiles_n, N + 1)
    how = {"LEAVES": leaves, "PIECES": pieces, "B_ALONG_K": along_k, "WGMMA": wgmma} | SIZES
    run(kernel, programs, seed, a, b, Pointer(out), Pointer(scratch), *numbers, **how)
    assert out[:, N].isnan().all()
    return out[:, :N].contiguous()


@pytest.mark.parametrize("wgmma", (True, False), ids=("sm_90", "sm_100"))
@settings(max_examples=30, deadline=None)
@given(
    leaves=st.sampled_from((2, 4, 8)),
    pieces=st.sampled_from((1, 2)),
    along_k=st.booleans(),
    length=st.sampled_from((16, 32, 40, 72)),
    m=st.integers(1, 20),
    n=st.integers(1, 9),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 1 << 30),
)
def test_bits_are_the_tensor_cores_whatever_happens_first(wgmma, leaves, pieces, along_k, length, m, n, dtype, seed):
    torch.manual_seed(seed)
    a, b = torch.randn(m, leaves * pieces * length).bfloat16(), torch.randn(leaves * pieces * length, n).bfloat16()
    expected = K16_25.product(a, b, leaves, pieces).to(dtype) + 0.0
    assert_same_bits(modelled(a, b, leaves, pieces, along_k, wgmma, dtype, seed), expected)


BOTH, SM_90, SM_100 = (True, False), (True,), (False,)
SPOILT = {
    "loads before a buffer is free": ("mbarrier.wait(free.index(slot), phase ^ 1)", "pass", BOTH),
    "multiplies before a load is done": ("mbarrier.wait(ready.index(slot), phase)", "pass", BOTH),
    "adds leaves in a chain": ("root = left + right", "root = root + left + right", BOTH),
    "frees what is being multiplied": ("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,", SM_90),
    "frees the wrong buffer": ("free.index(_before(slot, STAGES)), pred", "free.index(slot), pred", SM_90),
    "keeps a leaf's last buffer": ("mbarrier.arrive(free.index(_before(slot, STAGES)))", "pass", SM_90),
    "keeps buffers": ("mbarriers=[free.index(slot)]", "mbarriers=[]", SM_100),
    "keeps accumulators": ("mbarrier.arrive(taken.index(slot))", "pass", SM_100),
    "adds before a leaf is done": ("mbarrier.wait(done.index(slot), phase)", "pass", SM_100),
    "multiplies into what is not added yet": ("mbarrier.wait(taken.index(into), rounds ^ 1)", "pass", SM_100),
    "never starts an accumulator": ("memory.index(into), use_acc=step > 0", "memory.index(into), use_acc=True", SM_100),
}


@pytest.mark.parametrize(
    ("what", "wgmma"), [(what, wgmma) for what, (_, _, kinds) in SPOILT.items() for wgmma in kinds], ids=str
)
def test_the_model_tells_a_spoilt_kernel(what, wgmma, tmp_path):
    """By wrong bits, or because nobody can go on, at one seed at least."""
    old, new, _ = SPOILT[what]
    source = Path(specialised_kernel.__file__).read_text()
    assert old in source
    (tmp_path / "spoilt.py").write_text(source.replace(old, new))
    spec = spec_from_file_location("spoilt", tmp_path / "spoilt.py")
    spoilt = module_from_spec(spec)
    spec.loader.exec_module(spoilt)
    a, b = torch.randn(16, 8 * 64).bfloat16(), torch.randn(8 * 64, 8).bfloat16()
    expected = K16_25.product(a, b, 8)

    def told(seed):
        try:
            found = modelled(a, b, 8, 1, True, wgmma, torch.float32, seed, programs=1, kernel=spoilt.kernel)
        except Stuck:
            return True
        return not torch.equal(found.view(torch.int32), expected.view(torch.int32))

    assert any(told(seed) for seed in range(20))


@pytest.mark.parametrize("wgmma", (True, False), ids=("sm_90", "sm_100"))
def test_zeros_of_a_root_are_positive(wgmma):
    a, b = -torch.ones(8, 64).bfloat16(), torch.zeros(64, 4).bfloat16()
    assert not modelled(a, b, 2, 1, True, wgmma, torch.bfloat16, 0).signbit().any()


def taken(a, b, leaves, pieces=1, dtype=torch.float32, beside_collective=False):
    """What the compiled kernel gives."""
    launch = specialised.launch(fields_of(a, b), leaves, pieces, dtype, beside_collective)
    assert launch is not None
    return specialised.product(a, b, launch, dtype, None)


@pytest.mark.gpu
@pytest.mark.parametrize("K", (8 * 2 * 64, 8 * 2 * 72, 8 * 2 * 640))
@pytest.mark.parametrize(
    ("leaves", "pieces", "dtype"),
    (
        (2, 1, torch.bfloat16),
        (4, 2, torch.bfloat16),
        (8, 1, torch.bfloat16),
        (8, 2, torch.bfloat16),
        (8, 1, torch.float16),
    ),
)
@pytest.mark.parametrize("layout", ("ab", "abᵀ"))
def test_compiled_kernel_has_the_bits_of_gemm_kernel(layout, leaves, pieces, K, dtype, device):
    a, b = operands(2000, 1304, K, device, dtype, layout)  # more tiles than processors, ragged
    for result in (torch.float32, dtype):
        expected = product(a, b, leaves, pieces, result)
        for beside_collective in (False, True, False):  # often: a race may lose once
            assert_same_bits(taken(a, b, leaves, pieces, result, beside_collective), expected)


@pytest.mark.gpu
def test_compiled_kernel_has_the_bits_of_gemm_kernel_at_a_models_size(device):
    a, b = operands(8192, 4096, 12288, device)
    expected = product(a, b, 8)
    for _ in range(20):
        assert_same_bits(taken(a, b, 8), expected)

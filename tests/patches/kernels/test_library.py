"""A library's products are taken for the layouts at which they gave our bits once, and at no other."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.order.kernels import gemm, library
from tests.support.bits import assert_same_bits


class StandIn:
    """cuBLAS, as far as its bits go: ours, but one of them where N is `wrong`."""

    def __init__(self, wrong):
        self.wrong, self.calls = wrong, 0

    def multiply(self, a, b, dtype, into):
        self.calls += 1
        y = gemm.plan(gemm.fields_of(a, b), 1, 1, dtype, False, False, None).run(a, b, 1.0, None)
        if y.shape[1] == self.wrong:
            y.view(-1)[3] *= 2
        return y if into is None else into.add_(y)


@pytest.fixture
def stand_in(monkeypatch):
    found = StandIn(wrong=24)
    monkeypatch.setattr(gemm, "LIBRARY", library.Library(found.multiply))
    return found


def operands(n, device, m=20):
    return torch.randn(m, 32, device=device).bfloat16(), torch.randn(32, n, device=device).bfloat16()


@pytest.mark.parametrize(("n", "calls"), ((16, 3), (24, 1)))
def test_library_is_taken_after_it_gave_our_bits_and_never_after_it_did_not(n, calls, device, stand_in, monkeypatch):
    for _ in range(3):
        a, b = operands(n, device)
        y = gemm.product(a, b, dtype=torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr(gemm, "LIBRARY", None)
            assert_same_bits(y, gemm.product(a, b, dtype=torch.bfloat16))
    assert stand_in.calls == calls


def test_every_layout_dtype_and_alignment_is_tried_for_itself(device, stand_in):
    a, b = operands(16, device)
    wide = torch.zeros(20, 40, device=device).bfloat16()
    wide[:, 1:33] = a
    for x, y, dtype in (
        (a, b, torch.float32), (a, b, torch.bfloat16), (a.T.contiguous().T, b, torch.float32),
        (wide[:, 1:33], b, torch.float32), (a[:7], b, torch.float32),
    ):  # fmt: skip
        gemm.product(x, y, dtype=dtype)
    assert len(gemm.LIBRARY._same) == stand_in.calls == 5 and all(gemm.LIBRARY._same.values())


def test_product_is_added_once_when_both_add_it(device, stand_in):
    a, b = operands(16, device)
    into = torch.zeros(20, 16, device=device)
    for count in (1, 2, 3):
        gemm.add_product(into, a, b)
        assert torch.allclose(into, count * (a.float() @ b.float()), rtol=1e-2, atol=1e-2)


def test_trees_scaled_and_float32_products_are_never_a_librarys(device, stand_in):
    a, b = operands(16, device)
    gemm.product(a, b, leaves=2)
    gemm.product(a, b, scale=0.5)
    gemm.product(a.float(), b.float())
    gemm.product(a, b, beside_collective=True)
    assert not stand_in.calls


def test_it_is_off_unless_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(library.CUBLAS, raising=False)
    assert library.cublas() is None


class Specialised:
    """The warp-specialised kernel, as far as its bits go: ours, but one of them where N is `wrong`."""

    def __init__(self, wrong):
        self.wrong, self.calls = wrong, 0

    def launch(self, operands, leaves, pieces, dtype, beside_collective):
        return (leaves, pieces) if operands[3] == torch.bfloat16 and leaves <= 8 else None

    def product(self, a, b, launch, dtype, into):
        self.calls += 1
        y = gemm.plan(gemm.fields_of(a, b), *launch, dtype, False, False, None).run(a, b, 1.0, None)
        if y.shape[1] == self.wrong:
            y.view(-1)[3] *= 2
        return y


@pytest.mark.parametrize(("n", "calls"), ((16, 3 + 2), (24, 3)))
def test_trees_are_the_other_kernels_after_it_gave_our_bits_often_enough(n, calls, device, monkeypatch):
    found = Specialised(wrong=24)
    a, b = operands(n, device)
    expected = gemm.product(a, b, 4)
    monkeypatch.setattr(gemm, "TREES", (library.Library(found.product, times=3), found))
    for _ in range(3):
        assert_same_bits(gemm.product(a, b, 4), expected)
    assert found.calls == calls
    gemm.product(a, b)
    gemm.product(a, b, 16)
    gemm.product(a, b, 4, scale=0.5)
    gemm.product(a, b, 4, into=torch.zeros(20, n, device=device))
    gemm.product(a.float(), b.float(), 4)
    assert found.calls == calls


def test_no_tree_is_another_kernels_unless_asked_for(monkeypatch):
    monkeypatch.setattr(library, "INTERPRETED", False)
    monkeypatch.delenv(library.GLUON, raising=False)
    assert library.specialised() is None
    monkeypatch.setenv(library.GLUON, "1")
    assert library.specialised() is not None

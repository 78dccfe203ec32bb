"""What is tried on a device before its first product, and what bits are said to depend on."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.contract import UnsupportedError
from patches.order.kernels import checks, plans, provenance
from patches.order.kernels.gemm import product
from patches.order.kernels.tiles import tiles_of


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

"""Which product is taken: by the device of the operands, and never by another one than the run was patched for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from patches.contract import UnsupportedError
from patches.order import backend, products
from tpcheck.errors import TpcheckError
from tpcheck.run import resume

A = torch.arange(6.0).view(2, 3)


@pytest.fixture(autouse=True)
def back_to_any_device() -> Iterator[None]:
    yield
    backend.pin_device(None)


def test_product_on_another_device_than_the_run_was_patched_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_pinned", "cuda")
    with pytest.raises(UnsupportedError, match=r"on cpu in a run that was patched for cuda.*CUDA_VISIBLE_DEVICES"):
        products.product(A, A.t())
    with pytest.raises(UnsupportedError):
        products.product(A, A.t(), leaves=2)
    with pytest.raises(UnsupportedError):
        products.add_product(torch.zeros(2, 2), A, A.t())
    backend.pin_device("cpu")
    assert products.product(A, A.t()).equal(A @ A.t())


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed here")
def test_gpu_without_triton_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="need Triton"):
        backend.pin_device("cuda")


def test_operands_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="different devices: cpu, meta"):
        products.product(A, A.t().to("meta"))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_product_is_added_in_one_float32_addition(dtype: torch.dtype) -> None:
    into = torch.full((2, 2), 0.1, dtype=dtype)
    want = into + products.product(A, A.t())
    products.add_product(into, A, A.t())
    assert into.equal(want.to(dtype))


@pytest.mark.parametrize("told", (True, False), ids=("told", "before manifests told"))
def test_run_does_not_go_on_with_products_of_another_kind(told: bool) -> None:
    data = {"digest": "d"}
    exact, tensor_cores = {"leaf": "exact"}, {"kernel": "gemm_gpu", "family": "sm_90"}
    before = {"data": data, "config": {"strategy": "tree"}, **({"products": exact} if told else {})}
    assert resume.continued(before, {"data": data, "products": exact}, 3)["history"][0]["until_step"] == 3
    with pytest.raises(TpcheckError, match="of another kind, .*exact.*sm_90"):
        resume.continued(before, {"data": data, "products": tensor_cores}, 3)


def test_run_goes_on_wherever_bits_are_of_its_class() -> None:
    """On a B300 what an H100 began: neither names its architecture where both give the golden bits."""
    h100, other = ({"class": name, "functions": "ab"} for name in ("k16-25", "sm_103"))
    before = {"data": {"digest": "d"}, "config": {"strategy": "tree"}, "products": h100}
    now = {"data": before["data"], "hardware": {"gpus": ["B300"]}}
    assert resume.continued(before, {**now, "products": dict(h100)}, 3)["history"]
    with pytest.raises(TpcheckError, match="of another kind, .*k16-25.*sm_103"):
        resume.continued(before, {**now, "products": other}, 3)

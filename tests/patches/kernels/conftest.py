"""Kernels: compiled, on a GPU, where there is one; else in Triton's interpreter, on the CPU (make test-kernels)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch
from packaging.version import Version

TOO_NEW = Version("2.4")  # NumPy that Triton's interpreter does not run on

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a module with kernels is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or find_spec("triton") is None or Version(numpy.__version__) < TOO_NEW:
        return
    skip = pytest.mark.skip(reason=f"Triton's interpreter needs NumPy below {TOO_NEW}: make test-kernels")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_plans() -> Iterator[None]:
    """A test that replaces what plans are made with leaves none behind, and finds none of another's."""
    plans = sys.modules.get("patches.order.kernels.plans")
    if plans is not None:
        plans.plan.cache_clear()
    yield
    plans = sys.modules.get("patches.order.kernels.plans")
    if plans is not None:
        plans.plan.cache_clear()

"""Tests that need a GPU or Transformer Engine are skipped with a reason where there is none."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.support")

if find_spec("transformer_engine") is not None:
    from tests.support import te_cpu

    te_cpu.install()  # before anybody imports megatron

TE = Path(__file__).parent / "patches" / "te"


def pytest_report_header() -> str:
    if find_spec("transformer_engine") is None:
        return "Transformer Engine: none on the path (make test-te)"
    stand_in = ", its compiled part replaced by tests/support/te_cpu" if te_cpu.needs_stand_in() else ""
    return f"Transformer Engine: {te_cpu.te_version()}{stand_in}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TE in item.path.parents and find_spec("transformer_engine") is None:
            item.add_marker(pytest.mark.skip(reason="Transformer Engine is not on the path: make test-te"))
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU on this machine"))

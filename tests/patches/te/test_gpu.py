"""`transformer_engine.pytorch` modules with their compiled extension, on one GPU: right against float64, patched."""

from __future__ import annotations

import pytest

import patches
from tests.support.te_modules import CASES, assert_right, one_in_te, right_in_stock

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("strategy", ("tree", "gather"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_module_on_a_gpu_is_right(case, strategy):
    with patches.enabled(strategy):
        assert_right(one_in_te(case, False), case)


@pytest.mark.parametrize("case", list(filter(right_in_stock, CASES)), ids=str)
def test_stock_module_on_a_gpu_is_right(case):
    """What the stand-in for the extension claims to compute."""
    assert_right(one_in_te(case, False), case)

"""`transformer_engine.pytorch` modules under the patches: right against float64, with the same bits at every TP size,
with sequence parallelism (SP) and without; two microbatches."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.ranks import on_ranks
from tests.support.te_modules import CASES, Case, assert_right, in_te, right_in_stock

GATED = Case("LayerNormLinear", "column", stride=2)
UNMARKED = replace(GATED, marked=False)


def unequal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


@functools.cache
def results(tp: int, sp: bool, strategy: str) -> list[dict[Case, dict[str, Tensor]]]:
    """Every case's tensors, on each rank: all cases share one set of ranks."""
    cases = [*(CASES if strategy != "stock" else filter(right_in_stock, CASES)), GATED, UNMARKED]
    return [dict(zip(cases, found, strict=True)) for found in on_ranks(tp, in_te, cases, sp, strategy)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_module_is_right_and_has_same_bits_at_every_tp(case):
    one = results(1, False, "tree")[0][case]
    assert_right(one, case)
    for tp, sp in ((2, True), (2, False), (4, True), (4, False)):
        for rank, other in enumerate(results(tp, sp, "tree")):
            assert not unequal(one, other[case]), f"tp={tp} sp={sp} rank={rank}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_module_is_right_and_has_same_bits_at_every_tp_under_gather(case):
    one = results(1, False, "gather")[0][case]
    assert_right(one, case)
    assert not unequal(one, results(4, True, "gather")[0][case])


@pytest.mark.parametrize("case", filter(right_in_stock, CASES), ids=str)
def test_stand_in_for_the_extension_is_right(case):
    assert_right(results(1, False, "stock")[0][case], case)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.mode and c.dtype == torch.float32 and right_in_stock(c)], ids=str
)
def test_stock_module_has_other_bits_at_another_tp(case):
    assert unequal(results(1, False, "stock")[0][case], results(2, False, "stock")[0][case])


def test_bits_depend_on_tp_where_a_gated_weight_is_not_marked():
    """Rank r holds [gate_r | up_r]: without partition_stride=2 its leaves would pair other columns than TP=1's."""
    one, two = (results(tp, False, "tree")[0] for tp in (1, 2))
    assert set(unequal(one[UNMARKED], two[UNMARKED])) & {"dx0", "dx1"}
    assert not unequal(one[GATED], two[GATED])


@pytest.mark.parametrize("case", [c for c in CASES if c.main_grad and c.dtype == torch.float32], ids=str)
def test_first_microbatch_overwrites_main_grad_and_later_ones_add(case):
    """`main_grad` holds 7 before: none of it may stay, and no microbatch may get lost."""
    plain = replace(case, main_grad=False)
    found = results(1, False, "tree")[0]
    expected = found[plain] if plain in found else on_ranks(1, in_te, [plain], False, "tree")[0][0]
    assert not unequal(found[case], expected)

"""The static check itself: a kernel that got worse, or that no table knows, is named."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from tests.patches.kernels.static_kernels import SHARED_LIMIT, TABLE, TOLERANCE, Facts, broken_rules, differences
from tests.patches.kernels.variant import Variant

WGMMA = "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16"
GOOD = Facts(registers=168, stack=0, shared=SHARED_LIMIT, mma=(WGMMA,), asked=1, waits=1)
MMA, SUM = Variant("product", None, {}, expects="mma"), Variant("sum", None, {})


def test_committed_table_is_within_the_limits():
    for name, row in json.loads(TABLE.read_text())["kernels"].items():
        assert row.keys() == TOLERANCE.keys()
        variant = MMA if re.search(r"gemm (bf|fp)16|attention (forward|dq|dkdv) .*bf16", name) else SUM
        assert not broken_rules(name, (variant, int(name.split()[0][3:])), replace(GOOD, **row))


@pytest.mark.parametrize(
    ("change", "problem"),
    (
        ({"stack": 8}, "spills"),
        ({"shared": SHARED_LIMIT + 16}, "shared memory"),
        ({"mma": ()}, "tensor cores"),
        ({"mma": (WGMMA, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")}, "m16n8k8"),
        ({"mma": ("wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3",)}, "otherwise than the tensor core"),
        ({"waits": 2}, "waits for every wgmma"),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_broken_rule_is_named(change, problem):
    assert not broken_rules("it", (MMA, 90), GOOD)
    (found,) = broken_rules("it", (MMA, 90), replace(GOOD, **change))
    assert problem in found


@pytest.mark.parametrize("change", ({"registers": 176}, {"stack": 8}, {"shared": 1024}), ids=str)
def test_difference_from_the_table_is_named(change):
    table = {"it": {fact: getattr(GOOD, fact) for fact in TOLERANCE}}
    assert not differences(table, {"it": replace(GOOD, registers=170)})
    (found,) = differences(table, {"it": replace(GOOD, **change)})
    assert next(iter(change)) in found


def test_table_and_kernels_must_be_the_same_set():
    row = {fact: getattr(GOOD, fact) for fact in TOLERANCE}
    assert len(differences({"gone": row}, {"new": GOOD})) == 2

"""The static check itself: a kernel that got worse, or that no table knows, is named."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.patches.kernels.static_kernels import SHARED_LIMIT, TABLE, TOLERANCE, Facts, broken_rules, differences
from tests.patches.kernels.variant import Variant
from tests.support import ROOT

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


def names_not_carried(source: str) -> Iterator[str]:
    """Assignments x = y in a loop that sets y later only.

    Triton asks of a name which value it has after the body, in a trial where the loop's own values are those from
    before it: an x that began as y's value looks as if it never changed, and keeps its first value for ever.
    """
    for loop in ast.walk(ast.parse(source)):
        if isinstance(loop, (ast.For, ast.While)):
            every = [one for one in ast.walk(loop) if isinstance(one, (ast.Assign, ast.AugAssign))]
            set_at: dict[str, list[int]] = {}
            for one in every:
                for target in one.targets if isinstance(one, ast.Assign) else [one.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            set_at.setdefault(name.id, []).append(one.lineno)
            for one in every:
                value = one.value
                of = value.elts if isinstance(value, ast.Tuple) else [value]
                for name in of if isinstance(one, ast.Assign) else ():
                    lines = set_at.get(name.id, []) if isinstance(name, ast.Name) else []
                    if lines and min(lines) >= one.lineno:
                        yield f"line {one.lineno}: {ast.unparse(one)}"


@pytest.mark.parametrize(
    ("body", "found"),
    (
        ("before = x\n    x += 1", ["line 2: before = x"]),
        ("a, x = x, y\n    y = x + 1", ["line 2: a, x = (x, y)"] * 2),
        ("x += 1\n    before = x", []),
        ("before = size\n    x = before + 1", []),
    ),
)
def test_name_that_triton_would_not_carry_is_found(body, found):
    assert list(names_not_carried(f"while x < 9:\n    {body}\n")) == found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "patches" / "order" / "kernels").glob("*.py")), ids=lambda path: path.stem
)
def test_loops_of_kernels_carry_what_they_change(path):
    assert not list(names_not_carried(path.read_text()))

"""Accumulation orders: known ones are recovered, the tree strategy's is one and the same at every TP size."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcheck.cli import main
from tpcheck.errors import TpcheckError
from tpcheck.order.fprev import (
    LARGE,
    MAX_SUMMANDS,
    Node,
    Tree,
    formula,
    from_lists,
    lca_sizes,
    reveal_each,
    to_lists,
)
from tpcheck.order.setting import TARGETS, Setting
from tpcheck.order.targets import SUMS, trees

F32 = np.float32


def reveal(function: Callable[[list[float]], float], n: int) -> Tree:
    return reveal_each(lambda x: [function(x)], n)[0]


def sequential(x: Sequence[float]) -> float:
    total = F32(x[0])
    for value in x[1:]:
        total += F32(value)
    return float(total)


def pairwise(x: Sequence[float]) -> float:
    return float(F32(x[0])) if len(x) == 1 else float(F32(pairwise(x[: len(x) // 2])) + F32(pairwise(x[len(x) // 2 :])))


def blocked(x: Sequence[float]) -> float:
    return sequential([sequential(x[start : start + 4]) for start in range(0, len(x), 4)])


def strided(x: Sequence[float]) -> float:
    return pairwise([sequential(x[lane::4]) for lane in range(4)])


def exact(x: Sequence[float]) -> float:
    return float(F32(math.fsum(x)))


def fused(x: Sequence[float]) -> float:
    """One step of a tensor core: summands aligned to the largest, what falls below its last bit cut off."""
    top = max(map(abs, x))
    return exact([value for value in x if abs(value) > top * 2**-24])


def tensor_core(x: Sequence[float]) -> float:
    total = 0.0
    for start in range(0, len(x), 4):
        total = fused([total, *x[start : start + 4]])
    return total


@pytest.mark.parametrize(
    ("function", "n", "text"),
    [
        (sequential, 1, "0"),
        (sequential, 2, "0 + 1"),
        (sequential, 7, "0 + … + 6"),
        (lambda x: sequential(x[::-1]), 4, "0 + (1 + (2 + 3))"),
        (pairwise, 8, "((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))"),
        (blocked, 12, "((0 + … + 3) + (4 + … + 7)) + (8 + … + 11)"),
        (strided, 16, "((0 + 4 + … + 12) + (1 + 5 + … + 13)) + ((2 + 6 + … + 14) + (3 + 7 + … + 15))"),
        (fused, 5, "fused(0…4)"),
        (tensor_core, 12, "fused(fused(fused(0…3) 4…7) 8…11)"),
        (exact, 6, "exact(0…5)"),
        (lambda x: pairwise([exact(x[:5]), exact(x[5:])]), 10, "exact(0…4) + exact(5…9)"),
        (lambda x: fused([exact(x[:5]), *x[5:]]), 8, "fused(exact(0…4) 5 6 7)"),
    ],
)  # fmt: skip
def test_known_orders_are_revealed(function: Callable[[Sequence[float]], float], n: int, text: str) -> None:
    assert formula(reveal(function, n)) == text


def random_trees(leaves: Sequence[int], draw: Any) -> Tree:
    """A tree over `leaves`, whose first stands first."""
    if len(leaves) == 1:
        return leaves[0]
    if len(leaves) > 2 and draw(st.booleans()) and draw(st.booleans()):
        return Node("exact", tuple(sorted(leaves)))
    parts = draw(st.integers(2, min(4, len(leaves))))
    edges = [0, *sorted(draw(st.permutations(range(1, len(leaves))))[: parts - 1]), len(leaves)]
    children = [random_trees(leaves[lo:hi], draw) for lo, hi in itertools.pairwise(edges)]
    return Node("sum" if parts == 2 else "fused", tuple(sorted(children, key=first)))


def first(tree: Tree) -> int:
    return tree if isinstance(tree, int) else min(map(first, tree.children))


def value(tree: Tree, x: Sequence[float]) -> float:
    """What a machine gives that adds by `tree`."""
    if isinstance(tree, int):
        return x[tree]
    return {"sum": sequential, "fused": fused, "exact": exact}[tree.kind]([value(c, x) for c in tree.children])


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_tree_is_revealed(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 24))
    tree = random_trees(data.draw(st.permutations(range(n))), data.draw)
    assert reveal(lambda x: value(tree, x), n) == tree
    assert from_lists(json.loads(json.dumps(to_lists(tree)))) == tree


def test_results_of_one_function_may_have_different_orders() -> None:
    one, other = reveal_each(lambda x: [sequential(x), pairwise(x)], 4)
    assert (formula(one), formula(other)) == ("0 + … + 3", "(0 + 1) + (2 + 3)")


def test_longest_chains_are_revealed_and_printed() -> None:
    assert formula(reveal(sequential, MAX_SUMMANDS)) == f"0 + … + {MAX_SUMMANDS - 1}"
    backwards = reveal(lambda x: sequential(x[::-1]), MAX_SUMMANDS)
    assert from_lists(to_lists(backwards)) == backwards
    assert formula(backwards).startswith("0 + (1 + (2 + (3 + ")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: sequential(x) / 2, "not a count"),
        (lambda x: float("nan"), "not a count"),
        (lambda x: sequential(x[1:]), "not a sum of 6 summands"),
        (lambda x: exact([sequential(x[:2]), sequential(x[2:4]), sequential(x[4:])]), "no tree of additions"),
    ],
    ids=("mean", "nan", "one left out", "exact sum of partial sums"),
)
def test_what_is_no_tree_is_refused(function: Any, message: str) -> None:
    with pytest.raises(TpcheckError, match=message):
        reveal(function, 6)


def test_an_exact_sum_answers_as_no_roundings_can() -> None:
    assert exact([1.0, LARGE, 1.0, -LARGE, 1.0]) == 3
    assert set(lca_sizes(Node("exact", (0, 1, 2, 3, 4))).values()) == {2}


def orders(target: str, strategy: Any, sizes: Sequence[int], **options: Any) -> list[list[Tree]]:
    return [trees(Setting(target, strategy, tp, **options)) for tp in sizes]


LEAVES = "exact(0 1 2)", "exact(3 4 5)", "exact(6 7 8)", "exact(9 10 11)"
WITH_PIECES = "(0 + 8)", "(1 + 9)", "(2 + 10)", "(3 + 11)"


@pytest.mark.parametrize(
    ("target", "sizes", "size", "leaves", "options"),
    [
        ("row-parallel", (1, 2, 4, 8), 24, LEAVES, {"dtype": "bf16"}),
        ("gated", (1, 2, 4, 8), 16, WITH_PIECES, {"sp": True}),
        ("norm", (1, 2, 4, 8), 24, LEAVES, {}),
    ],
)  # fmt: skip
def test_tree_strategy_adds_in_one_order_at_every_tp(
    target: str, sizes: Sequence[int], size: int, leaves: Any, options: Any
) -> None:
    (one, *others), *elsewhere = orders(target, "tree", sizes, size=size, **options)
    a, b, c, d = leaves
    assert formula(one).startswith(f"(({a} + {b}) + ({c} + {d})) + ((")
    assert all(tree == one for found in (others, *elsewhere) for tree in found)


@pytest.mark.parametrize("target", ("row-parallel", "column-parallel", "norm"))
def test_stock_adds_in_another_order_at_every_tp(target: str) -> None:
    found = [each[0] for each in orders(target, "stock", (1, 2, 4), size=16)]
    assert len(set(found)) == 3


def test_gather_strategy_has_no_order_at_any_tp() -> None:
    assert {formula(tree) for found in orders("row-parallel", "gather", (1, 3), size=12) for tree in found} == {
        "exact(0…11)"
    }


def test_patched_local_product_has_no_order_and_stock_one_does() -> None:
    for dtype in ("fp32", "bf16"):
        (patched, _), (stock, _) = (trees(Setting("gemm", s, 2, 40, dtype=dtype)) for s in ("tree", "stock"))
        assert formula(patched) == "exact(0…39)"
        assert isinstance(stock, Node) and stock.kind == "sum"


def test_ring_adds_each_chunk_in_another_order_and_the_tree_does_not() -> None:
    assert len(set(trees(Setting("all-reduce", "stock", 1, 4)))) == 4
    assert [formula(tree) for tree in trees(Setting("all-reduce", "tree", 1, 4))] == ["(0 + 1) + (2 + 3)"] * 8


def test_command_prints_draws_and_answers(tmp_path: Path, capsys: Any) -> None:
    picture = tmp_path / "tree.svg"
    arguments = ["order", "gemm", "--strategy", "tree", "--size", "6", "--tp", "1,2", "--draw", str(picture)]
    assert main(arguments) == 0
    assert "TP=1, 2:\n  exact(0…5)\nequal" in capsys.readouterr().out
    assert "<svg" in picture.read_text()
    assert main(["order", "all-reduce", "--size", "3", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["equal"]
    assert len(answer["orders"]) == 2
    assert from_lists(answer["orders"][0]["tree"]) == Node("sum", (0, Node("sum", (1, 2))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "'nonsense' is not one of"),
        (["row-parallel", "--tp", "2,x"], "--tp 2,x: use sizes"),
        (["row-parallel", "--tp", "3"], "tp=3 does not cut size=32"),
        (["gated", "--size", "20"], "tp=4 does not cut size=20 into equal parts: use a multiple of 8"),
        (["norm", "--tp", "16", "--strategy", "tree"], "tp=16"),
        (["gemm", "--size", "1000"], "--size 1000: use 1 to 256"),
        (["gemm", "--size", "0"], "--size 0: use 1 to 256"),
        (["gemm", "--tp", ""], "use sizes separated by commas"),
        (["gemm", "--rows", "0"], "--rows 0: use 1 to 256"),
        (["all-reduce", "--tp", "2"], "all-reduce has no --tp"),
        (["all-reduce", "--sp"], "all-reduce has no sequence parallelism"),
        (["gemm", "--draw", "tree.txt"], "pictures end in"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["order", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_size_named_twice_is_one(capsys: Any) -> None:
    assert main(["order", "gemm", "--size", "4", "--tp", "1,1"]) == 0
    assert "TP=1:" in capsys.readouterr().out.splitlines()


def test_every_target_has_a_sum() -> None:
    assert list(TARGETS) == list(SUMS)

"""The order in which a black box adds its arguments: FPRev (Xie et al., arXiv 2411.00442), Algorithm FPRev.

    A^{i,j} = 1 … 1  M  1 … 1  -M  1 … 1          M at i, -M at j, ones elsewhere, M so large that M + n = M

Every 1 that is added to a partial sum holding M or -M is lost, until the two meet and cancel. What comes out counts
the ones added later; n minus that is l_ij, the number of summands under the node where i and j meet:

        +            l_01 = 2        a node that adds k > 2 numbers in one step, aligned to the largest (a tensor
       / \\           l_02 = 4        core's), loses all the others' ones: l = everything under it, from any pair
      +   +          l_23 = 2
     / \\ / \\                         an exact sum of k > 2 numbers has no order and loses none of its own ones: a
    0  1 2  3                        pair in it answers l = 2, however many they are; no tree of roundings can

So an order-free sum shows itself, and is one node with all its summands below it. Order-free sums of *partial* sums
would answer otherwise still; they are refused, as is whatever else is no tree.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from tpcheck.errors import TpcheckError

__all__ = [
    "LARGE",
    "MAX_SUMMANDS",
    "Kind",
    "Node",
    "Tree",
    "formula",
    "from_lists",
    "lca_sizes",
    "reveal_each",
    "to_lists",
]

LARGE = 2.0**120  # M: swallows ones in float64 accumulators too, and twice M is finite in bfloat16 and float32
MAX_SUMMANDS = 256  # bfloat16 counts that far without rounding, and Python recurses that deep
CHECKED = 2  # further pairs, times n, that a revealed tree has to answer for

Kind = Literal["sum", "fused", "exact"]


class Node(NamedTuple):
    """One addition. Children are in the order of their smallest summands: addition commutes, so equal is equal.

    Attributes:
        kind: "sum" of two, "fused" sum of more in one step, "exact" sum of more than two summands.
    """

    kind: Kind
    children: tuple[Tree, ...]


Tree: TypeAlias = int | Node  # a summand's number, or a node


def reveal_each(function: Callable[[list[float]], Sequence[float]], n: int) -> list[Tree]:
    """The trees by which `function` adds its `n` arguments, one for each of its results; a call for a pair asked about.

    Raises:
        TpcheckError: there are more than `MAX_SUMMANDS` of them, or none.
    """
    if not 1 <= n <= MAX_SUMMANDS:
        raise TpcheckError(f"the order of {n} summands cannot be revealed: use 1 to {MAX_SUMMANDS}")
    known: dict[tuple[int, int], list[int]] = {}

    def lca_size(i: int, j: int, result: int) -> int:
        pair = (min(i, j), max(i, j))
        if pair not in known:
            known[pair] = _lca_sizes_of(function, n, *pair)
        return known[pair][result]

    return [_reveal(functools.partial(lca_size, result=k), n) for k in range(len(function([1.0] * n)))]


def _lca_sizes_of(function: Callable[[list[float]], Sequence[float]], n: int, i: int, j: int) -> list[int]:
    """l_ij of every result."""
    x = [1.0] * n
    x[i], x[j] = LARGE, -LARGE
    survived = function(x)
    for ones in survived:
        if not (0 <= ones <= n - 2 and ones == int(ones)):
            raise TpcheckError(f"not a sum of {n} summands: with M at {i} and -M at {j} it gives {ones}, not a count")
    return [n - int(ones) for ones in survived]


def _reveal(lca_size: Callable[[int, int], int], n: int) -> Tree:
    tree = _canonical(_build(lca_size, list(range(n))))
    expected = lca_sizes(tree)
    for i, j in random.Random(n).sample(sorted(expected), min(CHECKED * n, len(expected))):
        if expected[i, j] != lca_size(i, j):
            raise TpcheckError(
                f"no tree of additions: {i} and {j} meet under {lca_size(i, j)} summands, "
                f"by the others {expected[i, j]}"
            )
    return tree


@dataclass(frozen=True)
class _Open:
    """A node being built, and how many summands it has in the end: more than are under it, if it is fused."""

    kind: Kind
    children: tuple[_Open | int, ...]
    final: int


def _build(lca_size: Callable[[int, int], int], among: list[int]) -> _Open | int:
    """FPRev's recursion. Its pivot is the first summand; the middle one keeps a chain's recursion shallow."""
    pivot = among[len(among) // 2]
    groups: dict[int, list[int]] = {}
    for j in among:
        if j != pivot:
            groups.setdefault(lca_size(pivot, j), []).append(j)
    tree: _Open | int = pivot
    for size in sorted(groups):
        met = groups[size]
        if size == 2 and len(met) > 1:
            tree = _Open("exact", (pivot, *met), 1 + len(met))
            continue
        other = _build(lca_size, met)
        if isinstance(other, _Open) and other.kind != "exact" and other.final == size:
            tree = _Open("fused", (tree, *other.children), size)
        else:
            tree = _Open("sum", (tree, other), size)
    return tree


def _canonical(tree: _Open | int) -> Tree:
    if isinstance(tree, int):
        return tree
    return Node(tree.kind, tuple(sorted(map(_canonical, tree.children), key=_first)))


def _first(tree: Tree) -> int:
    while isinstance(tree, Node):
        tree = tree.children[0]
    return tree


def lca_sizes(tree: Tree) -> dict[tuple[int, int], int]:
    """l_ij of every pair i < j."""
    found: dict[tuple[int, int], int] = {}
    _summands(tree, found)
    return found


def _summands(tree: Tree, found: dict[tuple[int, int], int]) -> list[int]:
    if isinstance(tree, int):
        return [tree]
    parts = [_summands(child, found) for child in tree.children]
    size = 2 if tree.kind == "exact" else sum(map(len, parts))
    for a, b in itertools.combinations(parts, 2):
        found.update({(min(i, j), max(i, j)): size for i in a for j in b})
    return [i for part in parts for i in part]


def to_lists(tree: Tree) -> Any:
    """`tree` for JSON: a node is [kind, child, child, …]."""
    return tree if isinstance(tree, int) else [tree.kind, *map(to_lists, tree.children)]


def from_lists(lists: Any) -> Tree:
    return lists if isinstance(lists, int) else Node(lists[0], tuple(map(from_lists, lists[1:])))


def formula(tree: Tree) -> str:
    """`tree` on one line: 0 + 1 + 2 is added from left to right, brackets before that; `exact` and `fused` sums."""
    if isinstance(tree, int):
        return str(tree)
    if tree.kind != "sum":
        return f"{tree.kind}({' '.join(_runs(tree.children, '…'))})"
    chain: list[Tree] = []
    node: Tree = tree
    while isinstance(node, Node) and node.kind == "sum" and isinstance(node.children[1], int):
        chain.insert(0, node.children[1])
        node = node.children[0]
    if not chain and isinstance(node, Node):
        return " + ".join(map(_bracketed, node.children))
    return " + ".join(_runs([node, *chain], " + … + "))


def _bracketed(tree: Tree) -> str:
    return f"({formula(tree)})" if isinstance(tree, Node) and tree.kind == "sum" else formula(tree)


def _runs(children: Sequence[Tree], between: str) -> Iterator[str]:
    """Formulas of `children`; summands at equal distances, more than three in a row, are shortened by `between`."""
    while children:
        run = _run(children)
        if len(run) > 3:
            if run[1] - run[0] > 1:
                yield str(run.pop(0))
            yield f"{run[0]}{between}{run[-1]}"
            children = children[children.index(run[-1]) + 1 :]
        else:
            yield _bracketed(children[0])
            children = children[1:]


def _run(children: Sequence[Tree]) -> list[int]:
    """The longest start of `children` that is summands at equal distances."""
    run: list[int] = []
    for child in children:
        if not isinstance(child, int) or (len(run) > 1 and child - run[-1] != run[1] - run[0]):
            break
        run.append(child)
    return run

"""Formulas: the text that is shown is the text that is evaluated; and of sums over ranks, those of the patches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType

from tpcheck.config.strategies import Strategy

__all__ = ["LOCAL", "SMALL_ROOT", "Lines", "evaluate", "is_small", "tree_all_reduce"]

LOCAL: tuple[Strategy, ...] = ("stock", "tree")  # who multiplies what a rank holds, and no more
SMALL_ROOT = 1 << 18  # bytes: patches.order.collectives.SMALL

Lines = Iterator[tuple[str, tuple[Strategy, ...], str]]  # what, who pays it, how much


def evaluate(formula: str, known: dict[str, float]) -> float:
    """The value of a formula, of the symbols of `known`."""
    return float(eval(_compiled(formula), {"__builtins__": {}}, known))  # formulas are of this package alone


@functools.cache
def _compiled(formula: str) -> CodeType:
    return compile(formula.replace("·", "*"), formula, "eval")


def is_small(elements: str, known: dict[str, float]) -> bool:
    """Whether ranks send each other so small a float32 root whole, instead of adding a slice each."""
    return evaluate(f"{elements}·4", known) <= SMALL_ROOT


def tree_all_reduce(
    name: str, count: str, elements: str, known: dict[str, float], e: str = "e", size: str = "t"
) -> Lines:
    """What the tree's sum over ranks moves, `count` times, for a root of so many `elements`.

    Args:
        e: bytes of an element of the result.
        size: of the group of ranks.
    """
    share = "ρ" if size == "t" else f"({size}-1)/{size}"
    if is_small(elements, known):
        yield f"{name}: all-gather of float32 roots", ("tree",), f"{count}·({size}-1)·{elements}·4"
    else:
        yield f"{name}: all-to-all of float32 roots", ("tree",), f"{count}·{share}·{elements}·4"
        yield f"{name}: all-gather of the result", ("tree",), f"{count}·{share}·{elements}·{e}"

"""Accumulation trees, drawn: summands along the bottom, every addition a bar above what it adds.

  ┌───┴───┐        sum: a thin bar
┌─┴─┐   ▄▄▄▄▄      fused: a thick bar; exact: a filled box, inside which there is no order
0   1   2 3 4
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tpcheck.order.fprev import Tree
from tpcheck.order.setting import Order
from tpcheck.pages.colours import COLOURS, FAINT, INK

__all__ = ["draw_orders"]

SPACING, TALLEST, LABELLED = 0.26, 3.2, 48  # inches a summand and a frame; more summands get every eighth number
FOOT = 0.55  # inches between frames, for numbers and titles


def draw_orders(orders: Sequence[Order], title: str, path: Path) -> None:
    """Write one frame per order to `path`, whose suffix says which format."""
    count = len(_leaves(orders[0].tree))
    heights = [min(TALLEST, 0.5 + 0.18 * _depth(order.tree)) for order in orders]
    width = min(14.0, max(7.5, count * SPACING + 1))
    with pyplot.rc_context({"font.size": 9, "text.color": INK, "svg.hashsalt": "tpcheck"}):
        figure, frames = pyplot.subplots(
            len(orders), 1, squeeze=False, figsize=(width, sum(heights) + FOOT * (len(orders) + 1)),
            gridspec_kw={"height_ratios": heights}, layout="constrained",
        )  # fmt: skip
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", wrap=True)
        for number, (axes, order) in enumerate(zip(frames[:, 0], orders, strict=True)):
            _frame(axes, order, COLOURS[number % len(COLOURS)])
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _frame(axes: Axes, order: Order, colour: str) -> None:
    leaves = _leaves(order.tree)
    places = {leaf: place for place, leaf in enumerate(leaves)}
    _bar(axes, order.tree, places, colour)
    axes.set_xlim(-0.7, len(leaves) - 0.3)
    axes.set_ylim(-0.15, _depth(order.tree) + 0.4)
    shown = leaves if len(leaves) <= LABELLED else leaves[::8]
    axes.set_xticks([places[leaf] for leaf in shown], map(str, shown), color=INK)
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(order.places, loc="left", color=colour)


def _bar(axes: Axes, tree: Tree, places: dict[int, int], colour: str) -> tuple[float, float]:
    """Draw `tree` and say where its top is."""
    if isinstance(tree, int):
        return places[tree], 0.0
    tops = [_bar(axes, child, places, colour) for child in tree.children]
    left, right, height = min(x for x, _ in tops), max(x for x, _ in tops), _depth(tree)
    if tree.kind == "exact":
        axes.add_patch(Rectangle((left - 0.3, 0.15), right - left + 0.6, height - 0.15, color=colour, alpha=0.3, lw=0))
        axes.plot([left - 0.3, right + 0.3], [height, height], color=colour, lw=1.4, solid_capstyle="butt")
        if right - left >= 2:
            axes.text((left + right) / 2, (height + 0.15) / 2, "exact", ha="center", va="center", fontsize=7)
    else:
        for x, y in tops:
            axes.plot([x, x], [y, height], color=FAINT if y == 0 else colour, lw=1.0)
        axes.plot([left, right], [height, height], color=colour, lw=3.5 if tree.kind == "fused" else 1.4)
    return (left + right) / 2, float(height)


def _leaves(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else [leaf for child in tree.children for leaf in _leaves(child)]


def _depth(tree: Tree) -> int:
    return 0 if isinstance(tree, int) else 1 + max(map(_depth, tree.children))

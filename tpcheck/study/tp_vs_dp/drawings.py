"""The pictures of `tp-vs-dp`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tpcheck.order.draw import draw_orders
from tpcheck.order.fprev import from_lists
from tpcheck.order.setting import Order
from tpcheck.pages.colours import COLOURS, INK
from tpcheck.pages.figures import LOOK, WIDTH, png, tidy
from tpcheck.study.study import Results
from tpcheck.study.tp_vs_dp import published

__all__ = ["growth", "stacked", "trees"]

BAND = "#F2F2F2"
DRAWN = 3  # orders of a sum


def growth(results: Results) -> bytes:
    """Mean difference of every layer's output at TP=4, with the analysis' points; below, what is exactly zero."""
    with pyplot.rc_context(LOOK):
        figure, (upper, lower) = pyplot.subplots(
            2, 1, figsize=(WIDTH, 4.2), sharex=True, layout="constrained", height_ratios=(5, 1)
        )
        for colour, (dtype, name) in zip(COLOURS, (("bf16", "bfloat16"), ("fp32", "float32")), strict=False):
            layers = results[f"layers-{dtype}"]["layers"]
            upper.plot(*_points(layers), "o-", ms=3, color=colour, label=f"stock, {name}")
            theirs = {n: mean for n, (_, mean) in published.LAYERS[dtype].items() if n < len(layers)}
            upper.plot(theirs.keys(), theirs.values(), "x", color=colour, ms=6, label=f"the analysis, {name}")
            zeros = [one["layer"] for one in results[f"tree-{dtype}"]["layers"] if not one["out"]["differing"]]
            lower.plot(zeros, [dtype] * len(zeros), "o", ms=3, color=colour)
        upper.set(yscale="log", ylabel="mean |TP=4 − TP=1| of a layer's output")
        upper.legend(frameon=False, fontsize=8, ncols=2)
        lower.set(xlabel="layer", ylabel="tree:\nexactly 0", facecolor=BAND)
        lower.margins(y=0.6)
        _finish(upper, lower)
        return png(figure)


def stacked(results: Results) -> bytes:
    """Pairs of layers: outputs and gradients, and what TF32 operands would do to float32."""
    found = results["stack"]
    cases = (("stock bf16", "bfloat16"), ("simulated tf32", "float32, operands as TF32"), ("stock fp32", "float32"))
    with pyplot.rc_context(LOOK):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 3.4), layout="constrained")
        for colour, (case, name) in zip(COLOURS, cases, strict=False):
            pairs = range(len(found[case]))
            axes.plot(pairs, [one["out"]["relative"] for one in found[case]], "o-", ms=3, color=colour, label=name)
            if "dout" in found[case][0]:
                back = [one["dout"]["relative"] or float("nan") for one in found[case]]
                axes.plot(pairs, back, ":", color=colour)
        axes.plot([], [], ":", color=INK, label="gradients of outputs")
        axes.set(yscale="log", xlabel="pair of layers", ylabel="relative difference, TP=4 and TP=1")
        axes.legend(frameon=False, fontsize=8)
        _finish(axes)
        return png(figure)


def trees(results: Results, case: str, title: str) -> bytes:
    """The first orders that `tpcheck order` found behind one target and strategy."""
    orders = [Order(from_lists(one["tree"]), one["places"]) for one in results["orders"][case][:DRAWN]]
    with tempfile.TemporaryDirectory(prefix="tpcheck-") as scratch:
        file = Path(scratch, "orders.png")
        draw_orders(orders, title, file)
        return file.read_bytes()


def _points(layers: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    return [one["layer"] for one in layers], [one["out"]["mean_abs"] for one in layers]


def _finish(*frames: Axes) -> None:
    for axes in frames:
        tidy(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

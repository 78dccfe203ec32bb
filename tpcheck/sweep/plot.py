"""The picture of a sweep: |loss - loss(first cell of the group)| per step, every strategy in one frame.

    10^-1 |        ____ stock TP=8        logarithmic: how far a loss is from the reference
    10^-4 |  __/\\_/____ stock TP=2
          /                               a break in the axis
        0 | . . . . . . gather, tree      a band for what is exactly equal: zero has no logarithm

A step whose loss equals the reference's, bit for bit, is a dot in the band and never anywhere else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tpcheck.files import result_dir
from tpcheck.pages.colours import COLOURS, FAINT, INK
from tpcheck.sweep.spec import Cell, Sweep, label, only_size

__all__ = ["Curve", "curves", "draw"]

LINES = {"stock": "-", "gather": ":", "tree": "--"}
WIDTH, LEFT, RIGHT, HEAD, UPPER, BREAK, FOOT = 9.4, 1.25, 2.1, 1.0, 3.2, 0.12, 0.75  # inches


@dataclass(frozen=True)
class Curve:
    """One cell's distance from its group's reference, by step."""

    panel: str  # settings other than the strategy and the invariant ones
    strategy: str
    variant: str
    reference: str
    distance: tuple[float, ...]


def curves(sweep: Sweep) -> list[Curve]:
    """Every cell that can be compared with the first of its group, over the steps that both have."""
    found = []
    for _, cells in sweep.groups():
        losses = {cell.name: [step["loss"] for step in result_dir.read_steps(cell.path)] for cell in cells}
        first, *others = cells
        for cell in others:
            pairs = zip(losses[cell.name], losses[first.name], strict=False)
            distance = tuple(abs(loss - reference) for loss, reference in pairs)
            if distance:
                found.append(Curve(_panel(cell), cell.config.strategy, cell.variant, first.variant, distance))
    return found


def _panel(cell: Cell) -> str:
    return label({key: value for key, value in cell.group.items() if key != "strategy"})


def draw(found: Sequence[Curve], title: str, subtitle: str, path: Path) -> None:
    """Write the picture to `path` as PNG."""
    panels = list(dict.fromkeys(curve.panel for curve in found))
    strategies = list(dict.fromkeys(curve.strategy for curve in found))
    variants = list(dict.fromkeys(curve.variant for curve in found))
    colours = dict(zip(variants, itertools.cycle(COLOURS), strict=False))
    band = max(0.75, 0.4 * len(strategies))
    height = HEAD + len(panels) * (UPPER + BREAK + band + FOOT)
    with pyplot.rc_context({"font.size": 10, "axes.edgecolor": FAINT, "text.color": INK, "axes.labelcolor": INK}):
        figure = pyplot.figure(figsize=(WIDTH, height))
        figure.text(0.15 / WIDTH, 1 - 0.32 / height, title, fontsize=13, fontweight="bold")
        figure.text(0.15 / WIDTH, 1 - 0.58 / height, subtitle, color="#555555")
        bottom = height - HEAD
        for panel in panels:
            shown = [curve for curve in found if curve.panel == panel]
            upper = _frame(figure, bottom := bottom - UPPER, UPPER)
            lower = _frame(figure, bottom := bottom - BREAK - band, band)
            bottom -= FOOT
            _distances(upper, shown, colours)
            _zeros(lower, shown, strategies, colours)
            _join(upper, lower, shown, panel)
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def _frame(figure: Figure, bottom: float, height: float) -> Axes:
    whole = figure.get_figheight()
    return figure.add_axes((LEFT / WIDTH, bottom / whole, (WIDTH - LEFT - RIGHT) / WIDTH, height / whole))


def _distances(axes: Axes, shown: Sequence[Curve], colours: dict[str, str]) -> None:
    """The upper part: what differs, on a logarithmic axis, with its name at the line's end."""
    axes.set_yscale("log")
    values = [value for curve in shown for value in curve.distance if 0 < value < math.inf]
    if not values:
        axes.set_ylim(1e-8, 1)
        axes.text(0.5, 0.5, "no loss differs at any step", transform=axes.transAxes, ha="center", color=FAINT)
        return
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 0.05)
    axes.set_ylim(10.0**low, 10.0**high)
    ends = []
    for curve in shown:
        line = [value if value > 0 else math.nan for value in curve.distance]
        known = [value for value in line if 0 < value < math.inf]
        if known:
            colour = colours[curve.variant]
            axes.plot(range(1, len(line) + 1), line, LINES.get(curve.strategy, "-."), color=colour, marker="o", ms=3)
            ends.append(((math.log10(known[-1]) - low) / (high - low), f"{curve.strategy} {curve.variant}", colour))
    for height, (_, name, colour) in zip(_apart([end[0] for end in sorted(ends)]), sorted(ends), strict=True):
        axes.annotate(name, (1.015, height), xycoords="axes fraction", color=colour, va="center", annotation_clip=False)


def _apart(wanted: Sequence[float], gap: float = 0.062) -> list[float]:
    """Rising heights as near to the `wanted` ones as names need, in fractions of the frame."""
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    surplus = sum(heights) / len(heights) - sum(wanted) / len(wanted)
    return [height - surplus for height in heights]


def _zeros(axes: Axes, shown: Sequence[Curve], strategies: Sequence[str], colours: dict[str, str]) -> None:
    """The band for exact equality: a row per strategy, a dot per step and variant whose loss is the reference's."""
    axes.set_facecolor("#F2F2F2")
    for row, strategy in enumerate(reversed(strategies)):
        mine = [curve for curve in shown if curve.strategy == strategy]
        for place, curve in enumerate(mine):
            height = row + (place - (len(mine) - 1) / 2) * -0.22
            steps = [step for step, value in enumerate(curve.distance, 1) if value == 0]
            axes.plot(steps, [height] * len(steps), "o", color=colours[curve.variant], markersize=3.2)
        axes.annotate(
            _tally(mine), (1.015, row), xycoords=("axes fraction", "data"), va="center", annotation_clip=False
        )
    axes.set_ylim(-0.5, len(strategies) - 0.5)
    axes.set_yticks(range(len(strategies)), reversed(strategies))
    axes.tick_params(axis="y", length=0)


def _tally(mine: Sequence[Curve]) -> str:
    steps = sum(len(curve.distance) for curve in mine)
    equal = sum(value == 0 for curve in mine for value in curve.distance)
    if steps and equal == steps:
        size = only_size([curve.variant for curve in mine])
        names = ", ".join(curve.variant.removeprefix(f"{size}=") for curve in mine)
        return f"{size}={names}: 0 at every step" if size else "0 at every step"
    return f"{equal} of {steps} steps equal"


def _join(upper: Axes, lower: Axes, shown: Sequence[Curve], panel: str) -> None:
    """Make the two parts one frame with a break in it."""
    last = max(len(curve.distance) for curve in shown)
    for axes in (upper, lower):
        axes.set_xlim(0.5, last + 0.5)
        axes.spines[["right", "top"]].set_visible(False)
        axes.tick_params(colors=INK)
    upper.spines.bottom.set_visible(False)
    upper.tick_params(axis="x", length=0, labelbottom=False)
    upper.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    upper.set_axisbelow(True)
    slash: dict[str, Any] = {
        "marker": [(-1, -0.6), (1, 0.6)],
        "markersize": 9,
        "linestyle": "none",
        "color": FAINT,
        "clip_on": False,
    }
    upper.plot([0], [0], transform=upper.transAxes, **slash)
    lower.plot([0], [1], transform=lower.transAxes, **slash)
    upper.set_ylabel(f"|loss − loss at {shown[0].reference}|")
    lower.set_ylabel("exactly 0")
    for axes in (upper, lower):
        axes.yaxis.set_label_coords(-0.85 / (WIDTH - LEFT - RIGHT), 0.5)
    lower.set_xlabel("step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel:
        upper.set_title(panel, loc="left", fontsize=10)

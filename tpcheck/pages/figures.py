"""How every picture of a report looks, and its bytes."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tpcheck.pages.colours import FAINT, INK

__all__ = ["LOOK", "WIDTH", "png", "tidy"]

WIDTH = 5.4  # inches; shown 370 pixels wide, its letters are still nine pixels high
LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
}


def png(figure: Figure) -> bytes:
    """The picture, which is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160, format="png")
    pyplot.close(figure)
    return buffer.getvalue()


def tidy(axes: Axes) -> None:
    """Leave out what tells nothing."""
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)

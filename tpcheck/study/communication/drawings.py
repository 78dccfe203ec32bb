"""The pictures of `communication`: where f and g sit, and the loss against blocks dropped."""

from __future__ import annotations

from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from tpcheck.pages.colours import COLOURS, FAINT, INK
from tpcheck.pages.figures import LOOK, WIDTH, png, tidy
from tpcheck.study.communication.settings import SIZES
from tpcheck.study.study import Results

__all__ = ["dropped", "sites", "times"]

LANES = (0.0, 3.1)  # of two ranks
WHOLE, CUT = "#E6E6E6", "#FFFFFF"
Op = tuple[str, str | None]  # its text, and which of f and g it is
# Of one half of a block, upwards: what every rank computes alike is wide, what it has a part of is drawn twice.
HALVES: tuple[tuple[str, str, str, str], ...] = (
    ("LayerNorm", "QKV, columns", "attention, own heads", "proj, rows"),
    ("LayerNorm", "fc1, columns", "GELU, own features", "fc2, rows"),
)


def sites(message: int) -> bytes:
    """A block on two ranks; `message` is what f and g each reduce, in bytes."""
    with pyplot.rc_context(LOOK):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 6.2), layout="constrained")
        height = _wide(axes, 0.0, "x: all tokens, all features, on every rank")
        for norm, first, inner, last in HALVES:
            height = _wide(axes, height, norm)
            height = _operator(axes, height, "f", "identity forward, all-reduce backward", COLOURS[1])
            for text in (first, inner, last):
                height = _twice(axes, height, text)
            height = _operator(axes, height, "g", "all-reduce forward, identity backward", COLOURS[0])
            height = _wide(axes, height, "+ bias, once; + x")
        axes.set(xlim=(-0.3, 9.6), ylim=(-0.3, height + 0.1))
        axes.text(
            6.4,
            0.3,
            f"each f and g:\n{message / 2**20:.2f} MiB, reduced\nover ranks, once a step",
            va="center",
            fontsize=8,
        )
        axes.axis("off")
        return png(figure)


def dropped(results: Results) -> bytes:
    """Above, the loss with blocks dropped at each TP size; below, what each block alone does."""
    found = results["spd"]
    with pyplot.rc_context(LOOK):
        figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(WIDTH, 4.6), layout="constrained", height_ratios=(3, 2))
        for colour, tp in zip(COLOURS, SIZES, strict=False):
            losses = found["losses"][str(tp)]
            upper.plot(range(len(losses)), losses, "o-", ms=3, color=colour, label=f"TP={tp}")
        upper.set(xlabel="blocks without attention's sum, the least harmful first", ylabel="loss on unseen text")
        upper.legend(frameon=False, fontsize=8)
        whole = found["losses"]["4"][0]
        lower.bar(range(len(found["alone"])), [loss - whole for loss in found["alone"]], color=COLOURS[2])
        lower.axhline(0, color=FAINT, lw=0.8)
        lower.set(xlabel="block", ylabel="loss added, alone, TP=4")
        for axes in (upper, lower):
            tidy(axes)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return png(figure)


def times(rows: list[dict[str, Any]]) -> bytes:
    """Milliseconds of each collective by TP size, in both dtypes."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    with pyplot.rc_context(LOOK):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 3.2), layout="constrained")
        for colour, name in zip(COLOURS, names, strict=False):
            for dtype, line in (("bfloat16", "-"), ("float32", ":")):
                mine = [row for row in rows if (row["name"], row["dtype"]) == (name, dtype)]
                shown = name if line == "-" else None
                points = [row["tp"] for row in mine], [row["ms"] for row in mine]
                axes.plot(*points, line, marker="o", ms=3, color=colour, label=shown)
        axes.plot([], [], ":", color=INK, label="in float32")
        axes.set(
            xscale="log", yscale="log", xlabel="TP", ylabel="ms", xticks=SIZES[1:], xticklabels=map(str, SIZES[1:])
        )
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
        tidy(axes)
        return png(figure)


def _wide(axes: Axes, height: float, text: str) -> float:
    _box(axes, LANES[0], height, LANES[1] + 2.7, text, WHOLE)
    return height + 0.85


def _twice(axes: Axes, height: float, text: str) -> float:
    for rank, left in enumerate(LANES):
        _box(axes, left, height, 2.7, f"{text}\nrank {rank}", CUT)
    return height + 0.85


def _operator(axes: Axes, height: float, name: str, text: str, colour: str) -> float:
    _box(axes, LANES[0], height, LANES[1] + 2.7, name, colour, ink="white")
    axes.text(LANES[1] + 3.1, height + 0.28, text.replace(", ", ",\n"), va="center", fontsize=8, color=colour)
    return height + 0.85


def _box(axes: Axes, left: float, bottom: float, width: float, text: str, colour: str, ink: str = INK) -> None:
    shape = FancyBboxPatch((left, bottom), width, 0.56, boxstyle="round,pad=0.04", facecolor=colour, edgecolor=FAINT)
    axes.add_patch(shape)
    axes.text(left + width / 2, bottom + 0.28, text, ha="center", va="center", fontsize=8, color=ink, linespacing=0.95)

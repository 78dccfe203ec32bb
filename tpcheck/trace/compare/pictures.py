"""The pictures of a comparison, each a PNG narrow enough to be read on a telephone.

growth      relative error over layers, logarithmic; dotted, what rounding may do
heat map    layer × module and kind, coloured by the logarithm of the relative error; suspects are framed
losses      both curves, and below how far they are apart
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from tpcheck.pages.colours import COLOURS, INK
from tpcheck.pages.figures import LOOK, WIDTH, png, tidy
from tpcheck.trace.compare.comparison import Comparison, Row
from tpcheck.trace.module_names import role_of

__all__ = ["growth", "heat_map", "losses"]

CURVES = (("out", "outputs"), ("dout", "gradients of outputs"), ("grad", "parameters' gradients"))
HEATED = ("out", "dout", "grad")
MARK = "#D55E00"


def growth(comparison: Comparison) -> bytes | None:
    """Median error and estimate of a layer's tensors, kind by kind, at the first step; None without layers."""
    found = _by_layer(comparison)
    if not found:
        return None
    with pyplot.rc_context(LOOK):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 3.4), layout="constrained")
        for (kind, label), colour in zip(CURVES, COLOURS, strict=False):
            layers = sorted(layer for layer, of in found if of == kind)
            if not layers:
                continue
            errors = [median(row.numbers.relative for row in found[layer, kind]) or math.nan for layer in layers]
            axes.plot(layers, errors, color=colour, marker="o", ms=3, label=label)
            known = [[row.estimate.overall for row in found[layer, kind] if row.estimate] for layer in layers]
            axes.plot(layers, [median(one) if one else math.nan for one in known], ":", color=colour)
        axes.plot([], [], ":", color=INK, label="what rounding may do")
        axes.set(yscale="log", xlabel="layer", ylabel="relative error, median of the layer")
        axes.legend(frameon=False, fontsize=8)
        _tidy(axes)
        return png(figure)


def heat_map(comparison: Comparison) -> bytes | None:
    """Every tensor of the layers at the first step, in the order of execution; white is exactly equal."""
    rows = [row for rows in _by_layer(comparison).values() for row in rows if row.key.kind in HEATED]
    if not rows:
        return None
    cells = {(_place(row), row.layer or 0): row for row in rows}
    first = {id(row): number for number, row in enumerate(comparison.rows)}
    places = sorted({place for place, _ in cells}, key=lambda place: _order(place, cells, first))
    layers = sorted({layer for _, layer in cells})
    values = [[_log(cells.get((place, layer))) for layer in layers] for place in places]
    with pyplot.rc_context(LOOK):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 1.5 + 0.16 * len(places)), layout="constrained")
        drawn = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
        for (place, layer), row in cells.items():
            if row.verdict == "suspect":
                corner = layers.index(layer) - 0.5, places.index(place) - 0.5
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=MARK, linewidth=1.2))
        every = max(1, len(layers) // 9)
        axes.set_xticks(range(0, len(layers), every), map(str, layers[::every]))
        axes.set_yticks(range(len(places)), [f"{name}  {kind}" for kind, name in places], fontsize=7)
        axes.set_xlabel("layer")
        bar = figure.colorbar(drawn, ax=axes, location="top", aspect=30)
        bar.set_label("log₁₀ of the relative error; framed: suspect")
        return png(figure)


def losses(a: Sequence[Mapping[str, float]], b: Sequence[Mapping[str, float]]) -> bytes | None:
    """The recorded losses of both runs, and their distance; None where a side has none."""
    ours, theirs = ({record["step"]: record["loss"] for record in side} for side in (a, b))
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    with pyplot.rc_context(LOOK):
        figure, (upper, lower) = pyplot.subplots(
            2, 1, figsize=(WIDTH, 3.8), sharex=True, layout="constrained", height_ratios=(3, 2)
        )
        upper.plot(common, [ours[step] for step in common], color=COLOURS[0], marker="o", ms=3, label="A")
        upper.plot(common, [theirs[step] for step in common], "--", color=COLOURS[1], marker="o", ms=3, label="B")
        upper.set_ylabel("loss")
        upper.legend(frameon=False)
        lower.plot(common, [abs(ours[step] - theirs[step]) or math.nan for step in common], "o-", color=INK, ms=3)
        lower.set(yscale="log" if any(ours[s] != theirs[s] for s in common) else "linear", ylabel="|A − B|")
        lower.set_xlabel("step")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (upper, lower):
            _tidy(axes)
        return png(figure)


def _by_layer(comparison: Comparison) -> dict[tuple[int, str], list[Row]]:
    """Rows of the first step that both traces have, by layer and kind."""
    found: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in comparison.rows:
        if row.layer is not None and row.key.step == comparison.rows[0].key.step:
            found[row.layer, row.key.kind].append(row)
    return dict(found)


def _place(row: Row) -> tuple[str, str]:
    """Kind and module, or parameter, within a layer."""
    parts = role_of(row.key.name).partition("*")[2].strip(".").split(".")
    return row.key.kind, ".".join(parts[-2:] if parts[-1] in ("weight", "bias") else parts[-1:]) or "layer"


def _order(
    place: tuple[str, str], cells: Mapping[tuple[tuple[str, str], int], Row], first: Mapping[int, int]
) -> tuple[int, int]:
    """Kinds one after the other, and within a kind what the first layer that has it does first."""
    layer = min(layer for other, layer in cells if other == place)
    return HEATED.index(place[0]), first[id(cells[place, layer])]


def _log(row: Row | None) -> float:
    relative = row.numbers.relative if row else 0.0
    return math.log10(relative) if 0 < relative < math.inf else math.nan


def _tidy(axes: Axes) -> None:
    tidy(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))

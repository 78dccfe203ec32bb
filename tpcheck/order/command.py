"""`tpcheck order`: one sum at several TP sizes, its accumulation trees on the terminal, as JSON or drawn.

Which element of the result is looked at may make a difference too: the answer is "equal" when one tree is behind all.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tpcheck.errors import TpcheckError
from tpcheck.order.fprev import MAX_SUMMANDS, Tree, formula, to_lists
from tpcheck.order.setting import Order, Setting, title

__all__ = ["command", "orders"]

FORMATS = (".svg", ".png", ".pdf")
LAYER_SIZES, LAYER_SUMMANDS, RANKS = "1,2,4,8", 32, 4


def command(target: str, tp: str | None, size: int | None, *, draw: Path | None, as_json: bool, **options: Any) -> int:
    """Reveal, print, draw; the arguments are those of the command line."""
    if draw is not None and draw.suffix not in FORMATS:
        raise TpcheckError(f"{draw}: pictures end in {', '.join(FORMATS)}")
    if target == "all-reduce" and tp is not None:
        raise TpcheckError("all-reduce has no --tp: its ranks are its summands, --size")
    if tp is None:
        tp = "1" if target == "all-reduce" else LAYER_SIZES
    if size is None:
        size = RANKS if target == "all-reduce" else LAYER_SUMMANDS
    for name, number in {"size": size, **options}.items():
        if isinstance(number, int) and not isinstance(number, bool) and not 1 <= number <= MAX_SUMMANDS:
            raise TpcheckError(f"--{name} {number}: use 1 to {MAX_SUMMANDS}")
    with warnings.catch_warnings():  # megatron-core's, that neither Apex nor Transformer Engine is installed
        warnings.simplefilter("ignore")
        settings = [Setting(target=target, tp=t, size=size, **options) for t in _sizes(tp)]
        found = orders(settings)
    if as_json:
        described = [{"places": order.places, "tree": to_lists(order.tree)} for order in found]
        print(json.dumps({**dataclasses.asdict(settings[0]), "tp": tp, "equal": len(found) == 1, "orders": described}))
    else:
        print("\n".join(_lines(settings[0], found)))
    if draw is not None:
        from tpcheck.order.draw import draw_orders

        draw_orders(found, title(settings[0]), draw)
    return 0 if len(found) == 1 else 1


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise TpcheckError(f"--tp {text}: use sizes separated by commas, as in {LAYER_SIZES}")
    return list(dict.fromkeys(sizes))


def orders(settings: Sequence[Setting]) -> list[Order]:
    """The different trees behind `settings`, in the order in which they are met."""
    from tpcheck.order.targets import check, trees

    for setting in settings:
        check(setting)
    found: dict[Tree, dict[int, list[int]]] = {}
    elements = 0
    for setting in settings:
        revealed = trees(setting)
        elements = len(revealed)
        for element, tree in enumerate(revealed):
            found.setdefault(tree, {}).setdefault(setting.tp, []).append(element)
    return [Order(tree, _places(by_tp, elements, settings[0].target)) for tree, by_tp in found.items()]


def _places(by_tp: dict[int, list[int]], elements: int, target: str) -> str:
    if target == "all-reduce":
        (where,) = by_tp.values()
        return "every element" if len(where) == elements else f"elements {', '.join(map(str, where))}"
    every = [str(tp) for tp, where in by_tp.items() if len(where) == elements]
    some = [f"TP={tp}, {'last' if where[0] else 'first'} element" for tp, where in by_tp.items() if len(where) == 1]
    return "; ".join([f"TP={', '.join(every)}"] * bool(every) + some)


def _lines(setting: Setting, found: Sequence[Order]) -> Iterator[str]:
    yield title(setting)
    for order in found:
        yield f"{order.places}:"
        yield f"  {formula(order.tree)}"
    if len(found) == 1:
        yield "equal: one order everywhere"
    else:
        yield f"different: {len(found)} orders"

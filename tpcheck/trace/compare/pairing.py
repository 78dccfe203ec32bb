"""What of B is to be held against what of A, where it is not what has the same name, step and place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tpcheck.trace.compare.logical import Key, Logical
from tpcheck.trace.compare.masks import dropped_apart
from tpcheck.trace.compare.reader import Trace

__all__ = ["aliases", "drops_otherwise", "permutation"]


def aliases(a: Trace, b: Trace) -> Iterator[tuple[Key, tuple[Key, Key, Key]]]:
    """What a trace begins with that goes on from a checkpoint, and what the other has of it after the step before.

    uninterrupted   … state.exp_avg of step 1 │ step 2 …
    resumed                    resumed.exp_avg │ step 2 …
    """
    for resumed, whole in ((b, a), (a, b)):
        for key in resumed.order:
            if key.kind.partition(".")[0] not in ("start", "resumed") or key in whole.records or not key.step:
                continue
            kind = "weight" if key.kind == "start" else key.kind.replace("resumed", "state")
            there = Key(key.step - 1, kind, key.name)
            if there in whole.records:
                name = Key(key.step, "resumed.weight" if key.kind == "start" else key.kind, key.name)
                yield key, (name, there, key) if resumed is b else (name, key, there)


def permutation(a: Logical | str, b: Logical | str) -> list[int]:
    """In which order B's samples are A's; empty where they are in the same one, or are others."""
    if isinstance(a, str) or isinstance(b, str) or a.batch != 0 or a.bits.shape != b.bits.shape or a.floats:
        return []
    if np.array_equal(a.bits, b.bits):
        return []
    places: dict[bytes, list[int]] = {}
    for place, sample in enumerate(b.bits):
        places.setdefault(sample.tobytes(), []).append(place)
    order = []
    for sample in a.bits:
        found = places.get(sample.tobytes())
        if not found:
            return []
        order.append(found.pop(0))
    return order


def drops_otherwise(a: Trace, b: Trace) -> bool:
    """Whether B's dropout drops other elements than A's, as it may where the layouts are two."""
    if a.layout == b.layout:
        return False
    for key in a.order:
        if key.kind == "mask" and key in b.records:
            x, y = a.logical_or_none(key), b.logical_or_none(key)
            if x is not None and y is not None and x.bits.shape == y.bits.shape and dropped_apart(x, y):
                return True
    return False

"""Vocabularies that two traces pad differently, as Megatron does at different TP sizes.

    A at TP=1  ┌──────────────┬──┐            B at TP=2  ┌──────────────┬─────┐
               │ the common rows │                       │ the common rows    │
               └──────────────┴──┘ 50304                 └──────────────┴─────┘ 50432

Whatever both have is compared up to the smaller size, which is at least the true one. The softmax over more logits is
another function, padded ones included: losses and gradients differ by more than rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tpcheck.trace.compare.logical import Key
from tpcheck.trace.compare.reader import Trace

__all__ = ["along_vocabulary", "cut_alike", "padding"]

ALONG = re.compile(r"(^|\.)(word_embeddings|output_layer)\.(weight|bias)$")


def padding(a: Trace, b: Trace) -> tuple[int, int] | None:
    """The sizes to which the traces pad their vocabularies, if they differ and nothing else does along them."""
    for key in a.records.keys() & b.records.keys():
        if key.kind in ("start", "grad") and along_vocabulary(key.name):
            x, y = _shape(a, key), _shape(b, key)
            divided = (x[0] or 0) in ((y[0] or 0) * b.tp, (y[0] or 0) // a.tp)  # not padded, but not marked as cut
            if len(x) == len(y) and x[0] != y[0] and x[1:] == y[1:] and not divided:
                return x[0] or 0, y[0] or 0
    return None


def cut_alike(a: Trace, b: Trace, others: Iterable[Trace] = ()) -> tuple[int, int] | None:
    """End both traces, and `others` of A's shapes, with the smaller vocabulary; the sizes of both, if they differ."""
    sizes = padding(a, b)
    if sizes is None:
        return None
    for key in a.records.keys() & b.records.keys():
        x, y = _shape(a, key), _shape(b, key)
        apart = [dim for dim in range(len(x)) if len(x) == len(y) and x[dim] != y[dim]]
        if len(apart) == 1 and (x[apart[0]], y[apart[0]]) == sizes:
            for trace in (a, b, *others):
                trace.cuts[key] = apart[0], min(sizes)
    return sizes


def along_vocabulary(name: str) -> bool:
    """Whether the first dimension of the parameter `name` is the vocabulary."""
    return bool(ALONG.search(name))


def _shape(trace: Trace, key: Key) -> tuple[int | None, ...]:
    return tuple(trace.records[key][0][2]["shape"])

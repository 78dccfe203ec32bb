"""What a checkpoint holds besides the tensors of model and optimizer, flattened to names with texts.

    common state     optimizer.param_groups.0.lr  0.001        opt_param_scheduler.num_steps  640     iteration  5
    objects by rank  rng_state/shard_0_2…         a digest of all that is in it

Groups of parameters, step counters, schedules, consumed samples and generator states: a run that resumes goes on from
these, too. Many follow the layout, so that they are no part of a digest that is promised to be one at all layouts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from blake3 import blake3

from tpcheck.checkpoint.reader import COMMON_STATE, Checkpoint
from tpcheck.checkpoint.unpickle import ITEMSIZE, Inert, Stored
from tpcheck.errors import shown

__all__ = ["beside"]

LONGEST = 80  # letters of a text that stands for itself


def beside(checkpoint: Checkpoint) -> dict[str, str]:
    """Name and text, sorted by name; damage raises `TpcheckError`."""
    common, view = checkpoint.common
    found = dict(_flattened("", common, view))
    for name in checkpoint.objects:
        if name != COMMON_STATE:
            value, inside = checkpoint.object_of(name)
            parts = sorted(_flattened("", value, inside))
            found[name] = _short(json.dumps(parts))
    return dict(sorted(found.items()))


def _flattened(name: str, value: Any, view: memoryview) -> Iterator[tuple[str, str]]:
    if isinstance(value, Inert):
        value = {**(value.state if isinstance(value.state, dict) else {}), **dict(enumerate(value.args)),
                 **{f"item {place}": item for place, item in enumerate(value.items)}}  # fmt: skip
    if isinstance(value, Stored):
        yield name, f"{value.dtype}{list(value.shape)} {blake3(_bytes(value, view)).hexdigest()[:16]}"
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _flattened(f"{name}.{key if isinstance(key, str) else shown(key)}".lstrip("."), inner, view)
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from _flattened(f"{name}.{place}".lstrip("."), inner, view)
    elif value is not None or name:
        yield name, _short(str(value) if isinstance(value, (str, int, float, bool)) else shown(value))


def _bytes(stored: Stored, view: memoryview) -> bytes:
    size = ITEMSIZE[stored.dtype]
    kind = f"u{size}" if size <= 8 else f"V{size}"
    strides = [stride * size for stride in stored.strides]
    return np.ascontiguousarray(np.ndarray(stored.shape, kind, view, stored.position, strides)).tobytes()


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else blake3(text.encode(errors="replace")).hexdigest()[:16]

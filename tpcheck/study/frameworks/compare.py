"""Two traced steps, tensor by tensor; Megatron's against Hugging Face's by the tensors that both have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tpcheck.study.frameworks.names import OUTPUTS, from_hugging_face
from tpcheck.trace.compare.logical import Key, Logical
from tpcheck.trace.compare.reader import Trace

__all__ = ["NORMS_OF", "distances", "norms"]

Array = npt.NDArray[np.float64]
NORMS_OF = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
KINDS = {"out": "outputs", "dout": "gradients of outputs", "grad": "gradients of parameters"}


def distances(a: Path, b: Path, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Per kind of tensor: how many were compared and differ, and the worst, relative to A, of the error's norm, of the
    difference of norms and of an element; names of those that differ; names whose ranks do not agree in B."""
    left, right = Trace(a), Trace(b)
    return {KINDS[kind]: _distance(kind, left, right, sizes) for kind in KINDS}


def norms(path: Path) -> dict[str, dict[str, float]]:
    """Of outputs, and of their gradients, that every framework has, by Hugging Face's names."""
    trace = Trace(path)
    found: dict[str, dict[str, float]] = {}
    for kind in ("out", "dout"):
        names = {hf: hf if Key(0, kind, hf) in trace.order else megatron for megatron, hf in OUTPUTS.items()}
        held = {name: trace.logical_or_none(Key(0, kind, names[name])) for name in NORMS_OF}
        found[KINDS[kind]] = {name: float(np.linalg.norm(x.values())) for name, x in held.items() if x is not None}
    return found


def _distance(kind: str, a: Trace, b: Trace, sizes: dict[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = {"tensors": 0, "differing": [], "unequal replicas": [], "error": 0.0, "worst": "",
                             "norm": 0.0, "max": 0.0}  # fmt: skip
    for name, x, y, replicas in _pairs(kind, a, b, sizes):
        found["tensors"] += 1
        if replicas:
            found["unequal replicas"].append(name)
        if np.array_equal(x, y):
            continue
        norm = max(float(np.linalg.norm(x)), 1e-30)
        error = float(np.linalg.norm(x - y)) / norm
        if error > found["error"]:
            found |= {"error": error, "worst": name}
        found["norm"] = max(found["norm"], abs(float(np.linalg.norm(y)) / norm - 1))
        found["max"] = max(found["max"], float(np.abs(x - y).max()))
        found["differing"].append(name)
    return found


def _pairs(kind: str, a: Trace, b: Trace, sizes: dict[str, int]) -> list[tuple[str, Array, Array, bool]]:
    mixed = _is_megatron(b) and not _is_megatron(a)
    pairs = []
    for key in sorted(b.order, key=b.order.__getitem__):
        if key.kind != kind or "rotary" in key.name or "dropout" in key.name or key.name in ("model", "whole model"):
            continue
        y = b.logical_or_none(key)
        x = _of_hugging_face(key, a, sizes) if mixed else _values(a.logical_or_none(key))
        if y is None or x is None:
            continue
        values = y.values()
        if mixed and kind != "grad":
            values = values.swapaxes(0, 1)
        if x.shape != values.shape:
            raise AssertionError(f"{key.name}: {x.shape} in {a.path}, {values.shape} in {b.path}")
        pairs.append((key.name, x, values, y.replicas is not None))
    return pairs


def _is_megatron(trace: Trace) -> bool:
    return any(key.name.startswith("decoder.") for key in trace.order)


def _of_hugging_face(key: Key, trace: Trace, sizes: dict[str, int]) -> Array | None:
    """What corresponds to Megatron's tensor."""
    if key.kind != "grad":
        return _values(trace.logical_or_none(key._replace(name=OUTPUTS.get(key.name, ""))))

    def values(name: str) -> Array:
        found = _values(trace.logical_or_none(key._replace(name=name)))
        assert found is not None, name
        return found

    return from_hugging_face(key.name, values, sizes, np.concatenate)


def _values(logical: Logical | None) -> Array | None:
    return None if logical is None else logical.values()

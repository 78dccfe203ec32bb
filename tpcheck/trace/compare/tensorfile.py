"""safetensors files, read as the bits they hold: mapped, checked, never executed.

numpy has no bfloat16, so every tensor is an array of unsigned integers of its dtype's size.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from tpcheck.checkpoint.tiling import Array
from tpcheck.errors import TpcheckError

__all__ = ["SIZES", "tensors"]

NAMES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I16": 2}  # any other: 1


def tensors(path: Path) -> dict[str, Array]:
    """The tensors of a file by name."""
    try:
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise TpcheckError(f"cannot read {path} ({error}): copy the whole trace again") from error
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:end]))
        return {name: _array(data[end:], entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TpcheckError(f"{path} is cut short or damaged ({error}): copy the trace again") from error


def _array(data: memoryview, entry: dict[str, Any]) -> Array:
    start, stop = entry["data_offsets"]
    shape, size = tuple(entry["shape"]), SIZES.get(entry["dtype"], 1)
    if entry["dtype"] not in NAMES or not 0 <= start <= stop <= len(data) or stop - start != math.prod(shape) * size:
        raise ValueError(f"bytes {start} to {stop} of {len(data)} for {entry['dtype']}{list(shape)}")
    return np.frombuffer(data[start:stop], f"<u{size}").reshape(shape)

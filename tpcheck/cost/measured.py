"""How fast products really were: what `make gpu` left in results/gpu, if it ran on such a GPU.

A rate is all FLOPs of a layer's products over their time, as one rank of that TP size multiplied them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.config.strategies import Strategy
from tpcheck.errors import TpcheckError
from tpcheck.files.json_files import read_object
from tpcheck.files.records import BenchRecord

__all__ = ["RESULTS", "Rates", "measured"]

RESULTS = Path("results/gpu")
FORMAT = 1  # of bench.json


@dataclass(frozen=True)
class Rates:
    """TFLOP/s of products by strategy, as measured on `device` into `file`."""

    device: str
    file: str
    tflops: dict[Strategy, float]


def measured(gpu: str, tp: int, results: Path = RESULTS) -> Rates | None:
    """The rates on a GPU whose name has `gpu` in it, at this TP size; None where nobody has measured any.

    Raises:
        TpcheckError: a file of measurements that is not one.
    """
    for file in sorted(results.glob("*/bench.json")):
        found = read_object(file, FORMAT, BenchRecord)
        rows = [row for row in found["products"] if row["tp"] == tp]
        if gpu.lower() in str(found["versions"].get("device", "")).lower() and rows:
            return _rates(file, found["versions"]["device"], rows)
    return None


def _rates(file: Path, device: str, rows: list[dict[str, Any]]) -> Rates:
    def rate(time: str, of: list[dict[str, Any]]) -> float:
        return sum(2e-9 * row["m"] * row["k"] * row["n"] for row in of) / sum(row[time] for row in of)

    try:
        one_leaf = [row for row in rows if row["leaves"] == 1]  # as `gather` multiplies
        rates: dict[Strategy, float] = {"stock": rate("mm_ms", rows), "tree": rate("ms", rows)}
        rates["gather"] = rate("ms", one_leaf)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise TpcheckError(f"{file}: not what `make gpu` writes ({error!r}): measure again, or remove it") from error
    return Rates(device, str(file), rates)

"""How long calls take on a device, one in turn with the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

BUDGET_MS = 60.0  # of a row's calls of one kind
FLUSHED = 1 << 28  # bytes, more than any L2 cache holds


class Clock:
    """Median milliseconds of calls that take turns, each after the L2 cache was overwritten."""

    def __init__(self, device: str, repeat: tuple[int, int], seconds: float) -> None:
        self.device, self.repeat, self.seconds = device, repeat, seconds
        self._deadline = time.monotonic() + seconds
        self._flushed = torch.empty(FLUSHED if device == "cuda" else 8, dtype=torch.uint8, device=device)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._deadline

    def times(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        first = {}
        for name, call in calls.items():
            call()  # compiles
            first[name] = self._timed(call)
        fewest, most = self.repeat
        count = max(fewest, min(most, int(BUDGET_MS / max(max(t() for t in first.values()), 1e-3))))
        taken: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
        for _ in range(count):
            for name, call in calls.items():
                taken[name].append(self._timed(call))
        return {name: statistics.median(t() for t in ts) for name, ts in taken.items()}

    def _timed(self, call: Callable[[], object]) -> Callable[[], float]:
        """Milliseconds of one call, to be asked for later: nothing waits for the GPU in between."""
        self._flushed.zero_()
        if self.device == "cpu":
            began = time.perf_counter()
            call()
            seconds = time.perf_counter() - began
            return lambda: seconds * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()

        def elapsed() -> float:
            end.synchronize()
            return begin.elapsed_time(end)

        return elapsed

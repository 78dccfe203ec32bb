"""Every collective of a step as it is called: which, of how many bytes, in which phase."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Event", "Recording", "sent"]

NAMES = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter",
         "alltoall_base_": "all-to-all"}  # fmt: skip
SCALARS = 5  # elements of the gradient norm and of flags, which `tpcheck cost` leaves out, too


@dataclass(frozen=True)
class Event:
    """One collective; `bytes` are the whole tensor's."""

    phase: str
    name: str
    bytes: int
    ranks: int


class Recording(TorchDispatchMode):
    """Lists what is called inside; autograd's own thread is the caller's on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.is_past_backward = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = function._schema.name.split("::")
        is_backward = torch._C._current_graph_task_id() != -1
        if namespace == "c10d":
            self._note(name, args, is_backward)
        self.is_past_backward |= is_backward
        return function(*args, **(kwargs or {}))

    def _note(self, name: str, args: Any, is_backward: bool) -> None:
        tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, torch.Tensor)]
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        if group.size() == 1 or max(tensor.numel() for tensor in tensors) <= SCALARS:
            return
        phase = "backward" if is_backward else "step" if self.is_past_backward else "forward"
        whole = max(tensor.nbytes for tensor in tensors)
        self.events.append(Event(phase, NAMES[name], whole, group.size()))


def sent(events: Iterable[Event], wanted: Callable[[Event], bool] = lambda event: True) -> float:
    """Bytes that a rank sends, each collective at the least volume that moves its data."""
    volumes = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}
    return sum(volumes[e.name] * (e.ranks - 1) / e.ranks * e.bytes for e in events if wanted(e))

"""Records what a training run computes, module by module, so that runs at other TP sizes can be compared with it.

    with tpcheck.trace("out/tp4", model):        around any existing training loop, on every rank
        …

Outputs, their gradients, parameters' gradients, weights and optimizer state go to one folder a rank, each with where
it belongs in the logical tensor. `tpcheck compare` reads them. This module can be called, being its own function.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpcheck.config.schema import KINDS

if TYPE_CHECKING:
    import torch

__all__ = ["KINDS", "trace"]


def trace(
    path: str | Path, model: torch.nn.Module | Sequence[torch.nn.Module], *, first: int = 0, **options: Any
) -> contextlib.AbstractContextManager[None]:
    """Record the steps that the loop inside makes with `model`, into `path`; on every rank, with the same arguments.

    Args:
        path: the trace's folder, without an earlier trace.
        model: as it is trained: bare, or in Megatron's DDP, torch's DDP or FSDP; or Megatron's list of chunks, of which
            a rank of a pipeline may have several; or the engine that `deepspeed.initialize` made.
        first: the number of the first step that is made inside, where a run goes on from a checkpoint.
        options: the fields of `tpcheck.config.schema.TraceConfig`.

    An exception leaves the trace unfinished, which `tpcheck compare` refuses.
    """
    from tpcheck.trace.record.recording import record

    return record(path, model, first=first, **options)


class _Callable(types.ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> contextlib.AbstractContextManager[None]:
        return trace(*arguments, **options)


sys.modules[__name__].__class__ = _Callable

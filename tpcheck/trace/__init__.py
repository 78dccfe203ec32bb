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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpcheck.config.load import parse_trace
from tpcheck.config.schema import KINDS
from tpcheck.errors import TpcheckError

if TYPE_CHECKING:
    import torch

__all__ = ["KINDS", "trace"]


@contextlib.contextmanager
def trace(path: str | Path, model: torch.nn.Module | Sequence[torch.nn.Module], **options: Any) -> Iterator[None]:
    """Record the steps that the loop inside makes with `model`, into `path`; on every rank, with the same arguments.

    Args:
        path: the trace's folder, without an earlier trace.
        model: as it is trained: bare, or in Megatron's DDP, torch's DDP or FSDP; or Megatron's list of chunks, of which
            a rank of a pipeline may have several; or the engine that `deepspeed.initialize` made.
        options: the fields of `tpcheck.config.TraceConfig`.

    An exception leaves the trace unfinished, which `tpcheck compare` refuses.
    """
    from tpcheck.trace.record.capture import Capture
    from tpcheck.trace.record.rank_layout import megatron_config, rank_layout_of
    from tpcheck.trace.record.rules import Rules
    from tpcheck.trace.record.store import Writer, rank_folder

    asked = parse_trace(options)
    models = list(model) if isinstance(model, Sequence) else [model]
    if len(models) != 1 and megatron_config(models) is None:
        raise TpcheckError(f"{len(models)} models cannot be traced into one folder: trace each into its own")
    layout = rank_layout_of(models)
    rules = Rules(models, layout)
    description = {**layout.to_json(), "dtype": _dtype(models), "sample": asked.sample, "perturb": asked.perturb}
    writer = Writer(rank_folder(Path(path), layout.rank), description)
    capture = Capture(models, rules, writer, asked)
    try:
        yield
    except BaseException:
        capture.unhook()
        raise
    capture.close()
    writer.close({"steps": capture.recorded})


def _dtype(models: Sequence[torch.nn.Module]) -> str:
    """The dtype of most parameters, which is the one that is computed in."""
    counts: dict[str, int] = {}
    for model in models:
        for parameter in model.parameters():
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + getattr(parameter, "ds_numel", parameter.numel())
    return max(counts, key=lambda name: counts[name], default="float32")


class _Callable(types.ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> contextlib.AbstractContextManager[None]:
        return trace(*arguments, **options)


sys.modules[__name__].__class__ = _Callable

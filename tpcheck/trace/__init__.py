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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpcheck.errors import TpcheckError

if TYPE_CHECKING:
    import torch

__all__ = ["KINDS", "Options", "trace"]

KINDS = ("start", "input", "out", "mask", "again", "dout", "din", "grad", "clip", "weight", "state")


@dataclass(frozen=True)
class Options:
    """What is recorded.

    Attributes:
        steps: numbers of steps, from 0; None: all.
        modules: patterns of module and parameter names, as the shell has them.
        kinds: of `KINDS`; none: all of them.
        sample: of every tensor, only each `sample`-th index of its longest dimension.
        perturb: a seed other than 0 makes the run nudge what it computes by one rounding: `tpcheck.trace.record.noise`.
    """

    steps: Collection[int] | None = None
    modules: Sequence[str] = ("*",)
    kinds: Sequence[str] = ()
    sample: int = 1
    perturb: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None and not (isinstance(self.steps, Collection) and all(map(_number, self.steps))):
            raise TpcheckError(f"steps={self.steps!r}: name them by numbers from 0, as in steps=[0, 1]")
        for name in ("modules", "kinds"):
            if isinstance(getattr(self, name), str):
                raise TpcheckError(f"{name}={getattr(self, name)!r}: use a list, [{getattr(self, name)!r}]")
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise TpcheckError(f"kinds={unknown}: use some of {', '.join(KINDS)}")
        if not _number(self.sample) or not self.sample:
            raise TpcheckError(f"sample={self.sample!r}: use a number from 1, which records everything")
        if not _number(self.perturb):
            raise TpcheckError(f"perturb={self.perturb!r}: use 0, or a seed above it")


@contextlib.contextmanager
def trace(path: str | Path, model: torch.nn.Module | Sequence[torch.nn.Module], **options: Any) -> Iterator[None]:
    """Record the steps that the loop inside makes with `model`, into `path`; on every rank, with the same arguments.

    Args:
        path: the trace's folder, without an earlier trace.
        model: as it is trained: bare, or in Megatron's DDP, torch's DDP or FSDP; or Megatron's list of chunks, of which
            a rank of a pipeline may have several; or the engine that `deepspeed.initialize` made.
        options: the fields of `Options`.

    An exception leaves the trace unfinished, which `tpcheck compare` refuses.
    """
    from tpcheck.trace.record.capture import Capture
    from tpcheck.trace.record.rank_layout import grid_of, megatron_config
    from tpcheck.trace.record.rules import Rules
    from tpcheck.trace.record.store import Writer, rank_folder

    if unknown := options.keys() - {field.name for field in fields(Options)}:
        allowed = ", ".join(field.name for field in fields(Options))
        raise TpcheckError(f"trace has no option {min(unknown)}: it has {allowed}")
    models = list(model) if isinstance(model, Sequence) else [model]
    if len(models) != 1 and megatron_config(models) is None:
        raise TpcheckError(f"{len(models)} models cannot be traced into one folder: trace each into its own")
    asked = Options(**options)
    grid = grid_of(models)
    rules = Rules(models, grid)
    description = {**grid.to_json(), "dtype": _dtype(models), "sample": asked.sample, "perturb": asked.perturb}
    writer = Writer(rank_folder(Path(path), grid.rank), description)
    capture = Capture(models, rules, writer, asked)
    try:
        yield
    except BaseException:
        capture.unhook()
        raise
    capture.close()
    writer.close({"steps": capture.recorded})


def _number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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

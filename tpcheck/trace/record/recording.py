"""The recording of a training loop, from its first step to its last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tpcheck.config.load import parse_trace
from tpcheck.errors import TpcheckError
from tpcheck.trace.record.capture import Capture
from tpcheck.trace.record.rank_layout import megatron_config, rank_layout_of
from tpcheck.trace.record.rules import Rules
from tpcheck.trace.record.store import Writer, rank_folder

__all__ = ["record"]


@contextlib.contextmanager
def record(
    path: str | Path, model: torch.nn.Module | Sequence[torch.nn.Module], *, first: int = 0, **options: Any
) -> Iterator[None]:
    """What `tpcheck.trace` does; it says what the arguments are."""
    asked = parse_trace(options)
    models = list(model) if isinstance(model, Sequence) else [model]
    if len(models) != 1 and megatron_config(models) is None:
        raise TpcheckError(f"{len(models)} models cannot be traced into one folder: trace each into its own")
    layout = rank_layout_of(models)
    rules = Rules(models, layout)
    description = {
        **layout.to_json(),
        "dtype": _dtype(models),
        "sample": asked.sample,
        "perturb": asked.perturb,
        "modules": asked.modules,
        "kinds": asked.kinds,
        "megatron": rules.config is not None,
    }
    writer = Writer(rank_folder(Path(path), layout.rank), description)
    capture = Capture(models, rules, writer, asked, first)
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

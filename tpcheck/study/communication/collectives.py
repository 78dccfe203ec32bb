"""The collectives of a training step, counted on real ranks, beside what `tpcheck cost` says; and their times."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcheck.config.schema import RunConfig
from tpcheck.cost.terms import step, total
from tpcheck.run.model import build_model, build_optimizer, train_step, transformer_config
from tpcheck.study.communication.counting import Event, Recording, sent
from tpcheck.study.communication.settings import SIZES, Communication
from tpcheck.study.megatron import begin, random_tokens
from tpcheck.study.ranks import on_ranks
from tpcheck.study.study import Progress

__all__ = ["collectives", "times"]


def collectives(settings: Communication, progress: Progress) -> dict[str, Any]:
    """For every TP size, without and with sequence parallelism: the step's collectives, and those of one layer.

    A layer's are what a model of two layers has more than one of one.
    """
    cases = [(tp, sp) for sp in (False, True) for tp in SIZES if not (sp and tp == 1)]
    found = []
    for number, (tp, sp) in enumerate(cases):
        progress(number / len(cases), f"TP={tp}" + ", sequence parallelism" * sp)
        runs = {layers: settings.run(tp, model={"num_layers": layers}, sequence_parallel=sp)
                for layers in (1, 2, settings.layers)}  # fmt: skip
        events = {layers: on_ranks(tp, _of_a_step, run)[0] for layers, run in runs.items()}
        per_layer = Counter(map(_kind, events[2]))
        per_layer.subtract(map(_kind, events[1]))
        found.append({
            "tp": tp, "sp": sp, "sent": sent(events[settings.layers]),
            "on_paper": total(step(runs[settings.layers]), "bytes", "stock"),
            "step": _rows(Counter(map(_kind, events[settings.layers]))), "layer": _rows(per_layer),
            "layer_sent": {phase: sent(events[2], _in(phase)) - sent(events[1], _in(phase))
                           for phase in ("forward", "backward")},
        })  # fmt: skip
    shapes = on_ranks(2, _shapes, settings.run(2))
    return {"cases": found, "shapes": shapes[0]}


def times(settings: Communication, progress: Progress) -> dict[str, Any]:
    """Median milliseconds of each collective at the size that a layer has, by TP size and dtype."""
    rows = []
    for number, tp in enumerate(SIZES[1:]):
        progress(number / (len(SIZES) - 1), f"TP={tp}")
        rows += on_ranks(tp, _timed, settings.seq_length, settings.hidden, settings.repeats)[0]
    return {"collectives": rows}


def _of_a_step(config: RunConfig) -> list[Event]:
    begin("stock")
    _, pieces = build_model(config, transformer_config(config))
    optimizer = build_optimizer(config, pieces)
    with Recording() as recording:
        train_step(config, pieces, optimizer, [random_tokens(config)])
    return recording.events


def _shapes(config: RunConfig) -> dict[str, list[int]]:
    """What a rank holds of a layer's matrices."""
    begin("stock")
    (model,), _ = build_model(config, transformer_config(config))
    layer = model.decoder.layers[0]
    modules = {"fc1": layer.mlp.linear_fc1, "fc2": layer.mlp.linear_fc2, "QKV": layer.self_attention.linear_qkv,
               "proj": layer.self_attention.linear_proj}  # fmt: skip
    return {name: list(module.weight.shape) for name, module in modules.items()}


def _kind(event: Event) -> tuple[str, str, int]:
    return event.phase, event.name, event.bytes


def _rows(counted: Counter[tuple[str, str, int]]) -> list[dict[str, Any]]:
    return [{"phase": phase, "name": name, "bytes": size, "count": count}
            for (phase, name, size), count in counted.items() if count]  # fmt: skip


def _in(phase: str) -> Callable[[Event], bool]:
    return lambda event: event.phase == phase


def _timed(tokens: int, hidden: int, repeats: int) -> list[dict[str, Any]]:
    size = dist.get_world_size()
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        whole, part = torch.ones(tokens, hidden, dtype=dtype), torch.ones(tokens // size, hidden, dtype=dtype)
        calls = {
            "all-reduce": lambda whole=whole, part=part: dist.all_reduce(whole),
            "all-gather": lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part),
            "reduce-scatter": lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole),
            "all-to-all": lambda whole=whole, part=part: dist.all_to_all_single(torch.empty_like(whole), whole),
        }
        rows += [{"tp": size, "dtype": str(dtype).removeprefix("torch."), "name": name, "bytes": whole.nbytes,
                  "ms": _median(call, repeats, whole)} for name, call in calls.items()]  # fmt: skip
    return rows


def _median(call: Callable[[], Any], repeats: int, whole: Tensor) -> float:
    taken = []
    for _ in range(repeats + 1):
        whole.fill_(1)
        dist.barrier()
        started = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken[1:])

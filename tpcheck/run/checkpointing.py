"""Checkpoints of a run: Megatron's torch_dist format, complete or not there at all.

    checkpoints/.new-step-00000020/   while it is written
    checkpoints/step-00000020/        renamed into place once every byte is on disk

A checkpoint loads at any tensor-, pipeline- and data-parallel size, with the distributed optimizer or without,
whichever way it was saved.
"""

from __future__ import annotations

import errno
import os
import queue
import shutil
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    extract_matching_values,
    merge,
)
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException  # which is no Exception

from tpcheck.checkpoint.reader import Checkpoint
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.files.json_files import sync
from tpcheck.run.resume import without

__all__ = ["discard_unfinished", "load", "save"]

UNFINISHED = ".new-"
FULL = 1 << 20  # bytes: a disk with less to give is why a checkpoint was not written
MAIN_PARAMETER = "optimizer.state.fp32_param."  # as the plain optimizer names it
SHARDED_MAIN_PARAMETER = "optimizer.state.param."  # as the distributed optimizer does
RESHARDABLE = "fully_reshardable" in getattr(DistributedOptimizer, "checkpoint_fully_reshardable_formats", ())


def discard_unfinished(output: Path) -> None:
    """Remove what a killed run left half written."""
    for folder in (output / "checkpoints").glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def save(output: Path, step: int, pieces: Sequence[Any], optimizer: Any) -> Path:
    """Write the state after `step` steps and put it into place; every rank calls this, at the same step.

    Args:
        pieces: of the model, those that this rank holds.
    """
    final = result_dir.checkpoint_path(output, step)
    new = final.with_name(UNFINISHED + final.name)
    if dist.get_rank() == 0:
        new.mkdir(parents=True)
    dist.barrier()
    model_state, optimizer_state = _state(pieces, optimizer, is_loading=False)
    try:
        _write({**model_state, "optimizer": optimizer_state, "step": step}, new)
    except (Exception, CheckpointException) as error:
        if shutil.disk_usage(new).free < FULL:  # torch says "iostream error"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(new)) from error
        raise
    dist.barrier()
    if dist.get_rank() == 0:
        _sync_files(new)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(new, final)
        sync(final.parent)
    dist.barrier()
    return final


def _write(state: dict[str, Any], folder: Path) -> None:
    # Megatron would start a manager process per rank for this queue, which outlives a killed rank.
    filesystem_async._results_queue = queue.SimpleQueue()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    # From megatron-core 0.17 on, the default writer is a package of its own that need not be installed.
    writer = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}
    request = dist_checkpointing.save(state, str(folder), strategy, async_sharded_save=True, **writer)
    if request.preload_fn:  # to the CPU; megatron-core 0.14 leaves it out of a synchronous save
        rank, _, results = request.async_fn_args
        request = request._replace(async_fn_args=[rank, request.preload_fn(), results], preload_fn=None)
    request.execute_sync()


def load(path: Path, step: int, pieces: Sequence[Any], optimizer: Any) -> None:
    """Fill model and optimizer from the checkpoint at `path`; every rank calls this and looks at a part first."""
    try:
        Checkpoint(path).require_loadable(dist.get_rank(), dist.get_world_size())
        _load(path, step, pieces, optimizer)
    except TpcheckError as error:
        raise TpcheckError(f"{error} {without(path)}") from error
    except (Exception, CheckpointException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TpcheckError(f"{path} does not load into this model: {reason[:300]}") from error


def _load(path: Path, step: int, pieces: Sequence[Any], optimizer: Any) -> None:
    """Only tensors come from the checkpoint: the rest of the optimizer's state follows from config and step."""
    model_state, optimizer_state = _state(pieces, optimizer, is_loading=True)
    wanted, rest = extract_matching_values(optimizer_state, _is_placeholder)
    stored = dist_checkpointing.load_tensors_metadata(str(path))
    wanted = dict_list_map_outplace(lambda value: _as_stored(value, stored), wanted)
    loaded = dist_checkpointing.load(model_state, str(path))
    for key, piece in zip(model_state, pieces, strict=True):
        piece.load_state_dict(loaded[key])
    tensors = dist_checkpointing.load({"resumed": wanted}, str(path))["resumed"]
    optimizer.load_state_dict(_with_step(merge(rest, tensors), step))


def _state(pieces: Sequence[Any], optimizer: Any, is_loading: bool) -> tuple[dict[str, Any], Any]:
    """The pieces' states, under Megatron's names for them, and the optimizer's."""
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable" if RESHARDABLE else "fully_sharded_model_space",
        "chained_optim_avoid_prefix": True,  # experts have an optimizer of their own, but names that say so already
    }
    keys = ["model"] if len(pieces) == 1 else [f"model{number}" for number in range(len(pieces))]
    states = [piece.sharded_state_dict(metadata=metadata) for piece in pieces]
    model_state = dict(zip(keys, states, strict=True))
    return model_state, optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, (ShardedBase, LocalNonpersistentObject))


def _as_stored(value: Any, stored: dict[str, ShardedTensor]) -> Any:
    """A main parameter under the name that the checkpoint has for it; anything else unchanged."""
    if not isinstance(value, (ShardedTensor, ShardedTensorFactory)):
        return value
    for prefix in (MAIN_PARAMETER, SHARDED_MAIN_PARAMETER):
        if value.key.startswith(prefix):
            name = value.key.removeprefix(prefix)
            names = [MAIN_PARAMETER + name, SHARDED_MAIN_PARAMETER + name]
            if name in stored and stored[name].dtype == torch.float32:
                names.append(name)  # float32 parameters are their own main parameters
            return replace(value, key=next((key for key in names if key in stored), value.key))
    return value


def _with_step(state: Any, step: int) -> Any:
    """The optimizer's state with Adam's step count, which is the number of steps that were trained."""
    if isinstance(state, dict) and 0 in state:  # of dense layers, of experts
        return {number: _with_step(one, step) for number, one in state.items()}
    inner = state.get("optimizer", state)
    if "state" in inner and not HAVE_APEX_OR_TE:
        inner["state"]["common_step"] = torch.tensor(float(step))
    else:
        for group in inner["param_groups"]:
            group["step"] = step
    return state


def _sync_files(folder: Path) -> None:
    for file in folder.rglob("*"):
        sync(file)
    sync(folder)

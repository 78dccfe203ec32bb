"""The training loop, as every rank of a run goes through it.

What a rank computes follows from (model, data, seed, step) alone. From where the run goes on, and whether it
stops, is agreed between ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from tpcheck.config.schema import RunConfig
from tpcheck.files import result_dir
from tpcheck.files.names import DIGESTS, TRACE
from tpcheck.run import checkpointing, exit_reason, provenance
from tpcheck.run.data import Source, rank_batches
from tpcheck.run.heartbeat import Watch
from tpcheck.run.model import (
    attention_backend,
    build_model,
    build_optimizer,
    seed_everything,
    set_learning_rate,
    train_step,
)
from tpcheck.run.place import Place
from tpcheck.run.resume import continued
from tpcheck.run.ring import connected
from tpcheck.run.step_display import Steps
from tpcheck.trace import trace

__all__ = ["Prepared", "Stop", "enable_patches", "process_group", "train"]

TIMEOUT = datetime.timedelta(minutes=10)  # a collective that waits longer has lost a rank


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run of which everything is decided that its ranks share; forked ranks inherit it."""

    config: RunConfig
    model: TransformerConfig
    data: Source


def train(prepared: Prepared, place: Place, start: int | None, stop: Stop, display: TextIO | None = None) -> None:
    """Train until the last step, or until a signal asks to leave; runs on every rank of the run.

    Args:
        start: the step to go on from; rank 0 knows it.
        stop: hears signals.
        display: for progress.
    """
    config, data, output = prepared.config, prepared.data, Path(prepared.config.output)
    patched = enable_patches(config)
    with process_group(config, place):
        stop.watch.peers = connected(place)
        bare, pieces = build_model(config, prepared.model)
        optimizer = build_optimizer(config, pieces)
        step = start = _agreed(start)
        if step:
            checkpointing.load(result_dir.checkpoint_path(output, step), step, bare, optimizer)
        dp_rank = parallel_state.get_data_parallel_rank()
        stage = parallel_state.get_pipeline_model_parallel_rank()
        main = place.rank == 0
        if main:
            manifest = _prepare_output(output, provenance.describe(config, data, patched), step)
        with traced(config, pieces, step), Steps(display if main else None, step, config.steps) as steps:
            if step:
                steps.say(f"going on from step {step}")
            while step < config.steps:
                began = time.perf_counter()
                rate = set_learning_rate(config, optimizer, step)
                if config.model.dropout:
                    seed_everything(config.seed + step + config.steps * stage)
                loss, grad_norm = train_step(config, pieces, optimizer, rank_batches(data, config, step, dp_rank))
                step += 1
                if main:
                    if step == start + 1:  # what computed attention is known once it has run
                        result_dir.write_manifest(output, {**manifest, "attention": attention_backend(config)})
                    record = _record(config, step, loss, grad_norm, rate, time.perf_counter() - began)
                    result_dir.append_step(output, record)
                    steps.show(record)
                leaving = stop.agreed() or step == config.stop_after
                due = config.checkpoint_every and step % config.checkpoint_every == 0
                if due or leaving or step == config.steps:
                    with stop.watch.unhurried():
                        checkpointing.save(output, step, bare, optimizer)
                if leaving:
                    break
            stop.watch.peers = None  # some leave now, others have work to do
            if main and step == config.steps:
                with stop.watch.unhurried():
                    _write_digests(output, step)
                steps.say(f"complete: {output}")
            elif main:
                steps.say(f"stopped and saved at step {step}: go on with --resume")
                exit_reason.record("stopped", f"saved at step {step}")


def enable_patches(config: RunConfig) -> list[dict[str, Any]]:
    """Turn on what the strategy asks for, and report it for the manifest."""
    import patches

    if config.strategy == "stock":
        patches.cpu.enable()
    else:
        batch = config.batch or "ordered"
        patches.enable(config.strategy, config.leaves, config.attention, config.symmetric_memory, batch, config.chunks)
    return [dataclasses.asdict(row) for row in patches.status()]


def traced(config: RunConfig, pieces: Sequence[torch.nn.Module], step: int) -> contextlib.AbstractContextManager[None]:
    """The recording of those steps that the run file names and that are yet to come, into `trace` in the output."""
    if config.trace is None or not config.trace.steps or step > max(config.trace.steps):
        return contextlib.nullcontext()
    return trace(Path(config.output, TRACE), pieces, first=step, **config.trace.model_dump())


@contextlib.contextmanager
def process_group(config: RunConfig, place: Place) -> Iterator[None]:
    """The run's ranks, connected.

    Left by an exception, it stays as it is: closing it would wait for ranks that may never come.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(place.local_rank)
    else:
        torch.set_num_threads(config.threads)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=place.meeting,
        rank=place.rank,
        world_size=place.world_size,
        timeout=TIMEOUT,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
        context_parallel_size=config.cp,
        expert_model_parallel_size=config.ep,
        expert_tensor_parallel_size=config.etp,
        distributed_timeout_minutes=TIMEOUT.seconds // 60,
    )
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


class Stop:
    """Hears the signals that ask a run to save and leave."""

    def __init__(self, signals: Iterable[signal.Signals], watch: Watch) -> None:
        self.watch = watch
        self.asked = False
        for number in signals:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        self.asked = True

    def agreed(self) -> bool:
        """Whether any rank heard one; all ranks get the same answer."""
        asked = torch.tensor([int(self.asked)]).cuda()
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


def _agreed(start: int | None) -> int:
    """The step to go on from, on every rank that of rank 0."""
    answer = [start]
    dist.broadcast_object_list(answer, src=0)
    assert answer[0] is not None
    return answer[0]


def _prepare_output(output: Path, description: dict[str, Any], step: int) -> dict[str, Any]:
    """Make the result directory what it was after `step` steps; its manifest."""
    if result_dir.is_result(output):
        description = continued(result_dir.read_manifest(output), description, step)
    output.mkdir(parents=True, exist_ok=True)
    result_dir.write_manifest(output, description)
    result_dir.truncate_steps(output, step)
    (output / DIGESTS).unlink(missing_ok=True)
    checkpointing.discard_unfinished(output)
    return description


def _record(config: RunConfig, step: int, loss: float, grad_norm: float, rate: float, seconds: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "loss_hex": loss.hex(),
        "grad_norm": grad_norm,
        "grad_norm_hex": grad_norm.hex(),
        "lr": rate,
        "tokens": config.global_batch_size * config.seq_length,
        "seconds": seconds,
    }


def _write_digests(output: Path, step: int) -> None:
    from tpcheck.checkpoint.digest import digest_checkpoint

    digests = digest_checkpoint(result_dir.checkpoint_path(output, step))
    result_dir.write_digests(output, {"step": step, **digests.to_json()})

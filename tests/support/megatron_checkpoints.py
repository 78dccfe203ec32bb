"""Checkpoints that megatron-core itself writes, of one small model after one step, by forked gloo ranks."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.ranks import on_ranks

SETTINGS = {
    "model": {"preset": "qwen3-tiny", "num_layers": 2, "hidden_size": 32, "head_dim": 8, "ffn_hidden_size": 48},
    "strategy": "stock",
    "seq_length": 16,
    "optimizer": {"clip_grad": 0.0},
}


def save_after_step(output: Path, *, bucket_size: int | None = None, patched: bool = False, **settings: Any) -> Path:
    """The same state whatever the settings' tp and dp: initial weights, and a step along gradients of 0.5.

    Args:
        bucket_size: elements from which on a DDP bucket is full; None: there is one bucket.
        patched: save it with the patches enabled, and only that.
    """
    size = settings.get("tp", 1) * settings.get("dp", 1)
    path: Path = on_ranks(size, _save, output, {**SETTINGS, **settings}, bucket_size, patched)[0]
    return path


def load_and_save(source: Path, output: Path, *, bucket_size: int | None = None, **settings: Any) -> Path:
    """Load what `save_after_step` saved into a fresh model, as stock does, and save that under the patches."""
    size = settings.get("tp", 1) * settings.get("dp", 1)
    path: Path = on_ranks(size, _load_and_save, source, output, {**SETTINGS, **settings}, bucket_size)[0]
    return path


def _save(output: Path, settings: dict[str, Any], bucket_size: int | None, patched: bool) -> Path:
    bare, pieces, optimizer = _build(settings, bucket_size)
    import patches
    from tpcheck.run import checkpointing

    for parameter in (parameter for piece in pieces for parameter in piece.parameters()):
        parameter.main_grad.fill_(0.5)
    optimizer.step()
    with patches.enabled() if patched else nullcontext():
        return checkpointing.save(output, 1, bare, optimizer)


def _load_and_save(source: Path, output: Path, settings: dict[str, Any], bucket_size: int | None) -> Path:
    bare, _, optimizer = _build({**settings, "seed": 99}, bucket_size)
    import patches
    from tpcheck.run import checkpointing

    checkpointing.load(source, 1, bare, optimizer)
    with patches.enabled():
        return checkpointing.save(output, 1, bare, optimizer)


def _build(settings: dict[str, Any], bucket_size: int | None) -> tuple[Any, Any, Any]:
    import patches

    patches.cpu.enable()
    from megatron.core import parallel_state

    from tpcheck.config.load import parse_run
    from tpcheck.run import model

    if bucket_size:  # in this rank's process alone
        model.DistributedDataParallelConfig = partial(
            model.DistributedDataParallelConfig, overlap_grad_reduce=True, bucket_size=bucket_size
        )
    config = parse_run(settings)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=config.tp)
    bare, pieces = model.build_model(config, model.transformer_config(config))
    return bare, pieces, model.build_optimizer(config, pieces)

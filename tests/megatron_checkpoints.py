"""Checkpoints that megatron-core itself writes, of one small model after one step, by forked gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ranks import on_ranks

SETTINGS = {
    "model": {"preset": "qwen3-tiny", "num_layers": 2, "hidden_size": 32, "head_dim": 8, "ffn_hidden_size": 48},
    "strategy": "stock",
    "seq_length": 16,
    "optimizer": {"clip_grad": 0.0},
}


def save_after_step(output: Path, **settings: Any) -> Path:
    """The same state whatever the settings' tp and dp: initial weights, and a step along gradients of 0.5."""
    size = settings.get("tp", 1) * settings.get("dp", 1)
    path: Path = on_ranks(size, _save, output, {**SETTINGS, **settings})[0]
    return path


def _save(output: Path, settings: dict[str, Any]) -> Path:
    import patches.cpu

    patches.cpu.enable()
    from megatron.core import parallel_state

    from tpcheck import saving
    from tpcheck.config import parse_run
    from tpcheck.model import build_model, build_optimizer

    config = parse_run(settings)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=config.tp)
    bare, pieces = build_model(config)
    optimizer = build_optimizer(config, pieces)
    for parameter in (parameter for piece in pieces for parameter in piece.parameters()):
        parameter.main_grad.fill_(0.5)
    optimizer.step()
    return saving.save(output, 1, bare, optimizer)

"""Configurations in which nothing is wrong: the detector has to keep quiet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from tests.silent_bugs.case import DROPOUT, FOUR, GPT2, MIXTURE, QWEN3, TIGHT, Clean, around, parts_of
from tests.silent_bugs.losses import masked, smoothed, with_z_loss
from tests.support.traces import replaced
from tpcheck.run import model, train

__all__ = ["CLEAN"]


@contextlib.contextmanager
def parameter_gathering_overlapped() -> Iterator[None]:
    """Weights are gathered while the next step's forward pass is under way, gradients reduced during backward."""

    def wrap(init: Callable[..., None]) -> Callable[..., None]:
        def overlapped(self: Any, config: Any, ddp_config: Any, *args: Any, **kwargs: Any) -> None:
            ddp_config.overlap_grad_reduce = ddp_config.overlap_param_gather = True
            init(self, config, ddp_config, *args, **kwargs)

        return overlapped

    def told(build: Callable[..., Any]) -> Callable[..., Any]:
        def build_and_tell(config: Any, pieces: Any) -> Any:
            optimizer = build(config, pieces)
            for one in parts_of(optimizer):
                one.config.overlap_param_gather = one.ddp_config.overlap_param_gather = True
            return optimizer

        return build_and_tell

    with around(DistributedDataParallel, "__init__", wrap), around(train, "build_optimizer", told):
        yield


def laid_out(change: Callable[[list[Tensor]], list[Tensor]]) -> Any:
    """A rank's microbatches are `change` of what they are elsewhere."""
    return around(train, "rank_batches", lambda batches: lambda *args: change(batches(*args)))


@contextlib.contextmanager
def samples_in_another_order() -> Iterator[None]:
    """Data-parallel ranks hold the global batch's samples one after the other, not by turns."""

    def wrap(batches: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        def in_a_row(data: Any, config: Any, step: int, rank: int) -> list[Tensor]:
            every = [batches(data, config, step, other) for other in range(config.dp)]
            in_order = [one for group in zip(*every, strict=True) for one in group]
            return in_order[rank * config.microbatches : (rank + 1) * config.microbatches]

        return in_a_row

    with around(train, "rank_batches", wrap):
        yield


@contextlib.contextmanager
def unequal_microbatches() -> Iterator[None]:
    """Microbatches of three samples and of one."""
    with laid_out(lambda batches: [torch.cat(batches)[:3], torch.cat(batches)[3:]]):
        yield


@contextlib.contextmanager
def shorter_sequences() -> Iterator[None]:
    """The second microbatch has shorter sequences."""
    shorter = laid_out(lambda batches: [batches[0], *(batch[:, :25] for batch in batches[1:])])
    with shorter, replaced(model, "global_mean", lambda losses: float(torch.stack([x.mean() for x in losses]).mean())):
        yield


def padded(at_tp_1: int, otherwise: int) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """The vocabulary is padded to a size that depends on TP, as Megatron-LM's is; the common rows begin alike."""

    @contextlib.contextmanager
    def inject() -> Iterator[None]:
        def wrap(build: Callable[..., Any]) -> Callable[..., Any]:
            def resized(config: Any, *args: Any) -> Any:
                size = at_tp_1 if config.tp == 1 else otherwise
                changed = config.model_copy(update={"model": _Padded(config.model, size)})
                return build(changed, *args)

            return resized

        with around(model, "_build_piece", wrap):
            yield

    inject.__name__ = f"padded_{at_tp_1}_{otherwise}"
    return inject


class _Padded:
    """A model's settings, with another padded vocabulary."""

    def __init__(self, settings: Any, size: int) -> None:
        self.settings, self.padded_vocab_size = settings, size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settings, name)


FP32 = {"dtype": "fp32"}
SP = {"sequence_parallel": True}
ZERO = {"distributed_optimizer": True}
SIGMOID = {"number": 8, "per_token": 2, "ffn_hidden_size": 72, "score": "sigmoid", "shared_ffn_hidden_size": 48}

CASES = [
    Clean("tp 2", {"tp": 2}),
    Clean("tp 2, fp32", {"tp": 2}, FP32),
    Clean("tp 4, sequence parallel", {"tp": 4, **SP}),
    Clean("tp 4, sequence parallel, fp32", {"tp": 4, **SP}, FP32),
    Clean("tp 8", {"tp": 8}),
    Clean("dp 2, another seed", {"dp": 2}, {"seed": 11}),
    Clean("dp 4, distributed optimizer, fp32", {"dp": 4, "micro_batch_size": 1, **ZERO}, {**FP32, "seed": 7}),
    Clean("tp 2 x dp 2, sequence parallel, distributed optimizer", {"tp": 2, "dp": 2, **SP, **ZERO}),
    Clean("tp 2, recompute, four microbatches", {"tp": 2, "recompute": True, "micro_batch_size": 1}),
    Clean("tp 2, tight clipping", {"tp": 2}, {"optimizer": {"clip_grad": 0.05}}),
    Clean("tp 4, tied embeddings, sequence parallel", {"tp": 4, **SP}, {"model": {**QWEN3, "tied": True}}),
    Clean("tp 4, grouped queries", {"tp": 4}, {"model": {**QWEN3, "num_query_groups": 4}}),
    Clean("tp 4, fewer key groups than ranks, fp32", {"tp": 4}, {"model": {**QWEN3, "num_query_groups": 2}, **FP32}),
    Clean("gpt-2 shape, tp 4, sequence parallel", {"tp": 4, **SP}, {"model": GPT2}),
    Clean("gpt-2 shape, tp 2, recompute, fp32", {"tp": 2, "recompute": True}, {"model": GPT2, **FP32, "seed": 3}),
    Clean(
        "tp 2, tight clipping, large vocabulary, fp32",
        {"tp": 2},
        {"model": {**GPT2, "vocab_size": 20000}, "optimizer": {"clip_grad": 0.05}, **FP32},
    ),
    Clean("eight layers, tp 2", {"tp": 2}, {"model": {**QWEN3, "num_layers": 8}}),
    Clean("experts, dp 2 x ep 2", {"dp": 2, "ep": 2}, {"model": MIXTURE}),
    Clean("experts, dp 4 x ep 2", {"dp": 4, "ep": 2, "micro_batch_size": 1}, {"model": MIXTURE}),
    Clean("experts, tp 2 x ep 2, sequence parallel", {"tp": 2, "ep": 2, "etp": 1, **SP}, {"model": MIXTURE, **FP32}),
    Clean(
        "sigmoid router, shared expert, tp 2, sequence parallel",
        {"tp": 2, **SP},
        {"model": {**MIXTURE, "experts": SIGMOID}},
    ),
    Clean("pp 2", {"pp": 2}),
    Clean("pp 2, tied embeddings, fp32", {"pp": 2}, {**FP32, "model": {**QWEN3, "tied": True}}),
    Clean("pp 2 with two pieces each, four layers", {"pp": 2, "vpp": 2}, {"model": {**QWEN3, "num_layers": 4}}),
    Clean("tp 2 x pp 2, sequence parallel, gpt-2 shape", {"tp": 2, "pp": 2, **SP}, {"model": GPT2}),
    Clean("dp 2, parameter gathering overlapped", {"dp": 2, **ZERO}, inject=parameter_gathering_overlapped),
    Clean("dp 2, samples in another order", {"dp": 2, "micro_batch_size": 1}, inject=samples_in_another_order),
    Clean("tp 2, microbatches of three and one", {"tp": 2}, world=unequal_microbatches),
    Clean("tp 2, one microbatch shorter", {"tp": 2}, world=shorter_sequences),
    Clean("tp 2, dropout", {"tp": 2}, {"model": DROPOUT}),
    Clean("dp 2, dropout, fp32", {"dp": 2}, {"model": DROPOUT, **FP32}),
    Clean("tp 1 recompute, dropout", {"recompute": True}, {"model": DROPOUT}),
    Clean("tp 2, padded vocabularies", {"tp": 2}, {"model": {**QWEN3, "vocab_size": 380}}, world=padded(384, 512)),
    Clean("tp 4, tight clipping, fp32", {"tp": 4}, {"optimizer": TIGHT, **FP32}),
    Clean(
        "tp 2 x dp 2, tight clipping, zero, fp32", {"tp": 2, "dp": 2, **ZERO}, {"optimizer": TIGHT, **FP32, "seed": 5}
    ),
    Clean(
        "gpt-2 shape, 1024 tokens, sequence parallel",
        {"tp": 2, **SP},
        {"model": GPT2, "seq_length": 64, "micro_batch_size": 8, "global_batch_size": 16, "seed": 2},
    ),
    Clean("gpt-2 shape, tp 2, another seed", {"tp": 2, **SP}, {"model": GPT2, "seed": 21}),
    Clean("resumed", {}, FOUR, resume=2),
    Clean("resumed, fp32", {}, {**FOUR, **FP32}, resume=2),
    Clean("resumed at tp 2", {"tp": 2}, FOUR, resume=2),
    Clean("resumed with dropout", {}, {**FOUR, "model": DROPOUT}, resume=2),
    Clean("tp 2, label smoothing", {"tp": 2}, world=smoothed),
    Clean("tp 2, z-loss", {"tp": 2}, world=with_z_loss),
    Clean("dp 2, masked loss", {"dp": 2}, world=masked),
    Clean("tp 2, four steps", {"tp": 2}, FOUR),
    Clean("tp 2, twelve layers, fp32", {"tp": 2}, {**FP32, "model": {**QWEN3, "num_layers": 12}}),
    Clean("tp 2, wide", {"tp": 2}, {"model": {**QWEN3, "hidden_size": 192, "head_dim": 24}}),
]
CLEAN = {case.name: case for case in CASES}

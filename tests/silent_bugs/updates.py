"""Bugs in the optimizer's step, in what is random, and in who reads which data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.tensor_parallel import random as mcore_random
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

from tests.silent_bugs.case import DP2, DROPOUT, GPT2, OUTPUT_LAYER_ROWS, TP2, around, bug, tp_rank
from tests.support.traces import replaced
from tpcheck.run import train


def built(change: Callable[[Any], None]) -> Any:
    """`change(piece)` of what a rank holds of a model, once it is built."""

    def wrap(build: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any) -> Any:
            pieces, trained = build(*args)
            for piece in pieces:
                change(piece)
            return pieces, trained

        return changed

    return around(train, "build_model", wrap)


@bug(
    "settings weight_decay *layernorm.weight", layout=TP2, dtype="fp32",
    source="https://github.com/bigscience-workshop/Megatron-DeepSpeed/pull/262",
)  # fmt: skip
def weight_decay_on_norms_of_one_rank() -> Iterator[None]:
    """Rank 1 has put the norms into the group of parameters that decay."""

    def wrap(build: Callable[..., Any]) -> Callable[..., Any]:
        def decaying(*args: Any) -> Any:
            optimizer = build(*args)
            for group in optimizer.param_groups:
                group["wd_mult"] = 1.0 if tp_rank() == 1 else group["wd_mult"]
            return optimizer

        return decaying

    with around(train, "build_optimizer", wrap):
        yield


@bug(
    "weight embedding*", "weight decoder.layers.0.*",  # the buffer holds the last layers first
    layout={**DP2, "distributed_optimizer": True},
    source="https://github.com/NVIDIA/Megatron-LM/issues/950",
)  # fmt: skip
def distributed_optimizer_skips_a_shard() -> Iterator[None]:
    """What data-parallel rank 1 has updated never reaches the parameters' buffer."""

    def wrap(copy: Callable[..., None]) -> Callable[..., None]:
        return lambda self: None if parallel_state.get_data_parallel_rank() == 1 else copy(self)

    with around(DistributedOptimizer, "_copy_main_params_to_model_params", wrap):
        yield


@bug("weight *", layout=TP2, source="https://github.com/NVIDIA/Megatron-LM/issues/663")
def weights_not_copied_from_main_parameters() -> Iterator[None]:
    """The model goes on with last step's bf16 weights: the updated float32 ones are not copied."""
    with replaced(Float16OptimizerWithFloat16Params, "_copy_main_params_to_model_params", lambda self: None):
        yield


@bug(
    "weight output_layer.weight", layout=TP2, source="https://github.com/NVIDIA/Megatron-LM/issues/950",
)  # fmt: skip
def output_layer_not_copied_from_its_main_parameter() -> Iterator[None]:
    """The output layer alone goes on with last step's bf16 weight."""

    def wrap(copy: Callable[..., None]) -> Callable[..., None]:
        def all_but_one(self: Any) -> None:
            *_, stale = (p for group in self.float16_groups for p in group if p.shape[0] == OUTPUT_LAYER_ROWS)
            before = stale.detach().clone()
            copy(self)
            stale.data.copy_(before)

        return all_but_one

    with around(Float16OptimizerWithFloat16Params, "_copy_main_params_to_model_params", wrap):
        yield


@bug("settings lr", layout=TP2)
def learning_rate_doubled_on_one_rank() -> Iterator[None]:
    """Rank 1 updates its shards with twice the learning rate."""

    def wrap(set_rate: Callable[..., float]) -> Callable[..., float]:
        def doubled(config: Any, optimizer: Any, step: int) -> float:
            rate = set_rate(config, optimizer, step)
            for group in optimizer.param_groups:
                group["lr"] *= 1 + tp_rank()
            return rate

        return doubled

    with around(train, "set_learning_rate", wrap):
        yield


@bug("start *", layout=TP2, source="https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/5840")
def initial_weights_drawn_shard_by_shard() -> Iterator[None]:
    """Every rank draws its shard of a weight by itself, so that the model depends on TP."""

    def by_itself(gpt: Any) -> None:
        for parameter in gpt.parameters():
            if getattr(parameter, "tensor_model_parallel", False):
                gpt.config.init_method(parameter.data)

    with built(by_itself):
        yield


@bug(
    "start embedding.position_embeddings.weight", layout=TP2, model=GPT2,
    source="https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5396",
)  # fmt: skip
def replicated_weights_drawn_by_each_rank() -> Iterator[None]:
    """Learned positions, which ranks hold alike, are drawn from generators that ranks seed differently."""

    def seeded(gpt: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(tp_rank())
            gpt.config.embedding_init_method(gpt.embedding.position_embeddings.weight.data)

    with built(seeded):
        yield


@bug(
    "mask *attention_dropout dropout", layout=TP2, model=DROPOUT,
    source="https://github.com/InternLM/InternLM/pull/405",
)  # fmt: skip
def dropout_seeds_equal_where_they_must_differ() -> Iterator[None]:
    """Ranks drop the same elements of different heads."""
    with replaced(CudaRNGStatesTracker, "fork", lambda self, name="": contextlib.nullcontext()):
        yield


@bug(
    "mask embedding* dropout", layout=TP2, model=DROPOUT, source="https://github.com/NVIDIA/Megatron-LM/pull/206",
)  # fmt: skip
def dropout_seeds_different_where_they_must_be_equal() -> Iterator[None]:
    """Ranks drop different elements of the activations that all of them hold."""

    def wrap(seed_everything: Callable[[int], None]) -> Callable[[int], None]:
        return lambda seed: seed_everything(seed + tp_rank())

    with around(train, "seed_everything", wrap):
        yield


@bug(
    "again *", layout={"recompute": True}, model=DROPOUT, source="https://github.com/allenai/OLMo-core/pull/828",
)  # fmt: skip
def recomputation_drops_other_elements() -> Iterator[None]:
    """Activations are recomputed without going back to the random state of the forward pass."""
    with replaced(mcore_random, "_set_all_rng_states", lambda *states: None):
        yield


@bug("input *", layout=DP2)
def data_parallel_ranks_read_the_same_samples() -> Iterator[None]:
    """Every data-parallel rank reads the samples of rank 0."""

    def wrap(batches: Callable[..., Any]) -> Callable[..., Any]:
        return lambda data, config, step, rank: batches(data, config, step, 0)

    with around(train, "rank_batches", wrap):
        yield

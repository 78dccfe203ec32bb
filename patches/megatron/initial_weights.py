"""Megatron's initializers, models and configs: what makes their weights drawn by name (`patches.initial_weights`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from patches.call_site import tp_group
from patches.contract import Contract, UnsupportedError
from patches.initial_weights import WHY, Noted, drawn_by_name, is_building, note
from patches.registry import REGISTRY, attribute

__all__ = ["PATCHES", "by_name"]

LAYERS = "megatron.core.tensor_parallel.layers"


@contextlib.contextmanager
def by_name() -> Iterator[None]:
    """Draw the weights of models that are built inside by name, as under `patches.enable()`; nothing else changes."""
    if REGISTRY.contract is not None:
        yield
        return
    undo = [patch.install(Contract()) for patch in PATCHES]
    try:
        yield
    finally:
        while undo:
            undo.pop()()


def _model_init(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if is_building():
            original(self, *args, **kwargs)
            return
        with drawn_by_name(self), _noting((*args, *kwargs.values())):
            original(self, *args, **kwargs)

    return __init__


def _setup_embeddings(original: Any) -> Any:
    @functools.wraps(original)
    def setup_embeddings_and_output_layer(self: Any) -> None:
        if not is_building():
            original(self)
            return
        # Copies on two pipeline stages are both drawn by name. To wait for the other's here is to wait for ever: with
        # virtual stages, its rank first wants to agree on a seed with this one.
        self._is_in_embd_group = lambda: False
        try:
            original(self)
        finally:
            del self._is_in_embd_group

    return setup_embeddings_and_output_layer


@contextlib.contextmanager
def _noting(arguments: tuple[Any, ...]) -> Iterator[None]:
    """The init methods of all configs among `arguments`, made to note."""
    found = [
        (config, name, getattr(config, name))
        for config in arguments
        for name in ("init_method", "output_layer_init_method", "embedding_init_method")
        if hasattr(config, "tensor_model_parallel_size") and callable(getattr(config, name, None))
    ]
    for config, name, init_method in found:
        setattr(config, name, Noted(init_method))
    try:
        yield
    finally:
        for config, name, init_method in found:
            setattr(config, name, init_method)


def _initialize_on_cpu(original: Any) -> Any:
    @functools.wraps(original)
    def initialize(
        weight: Tensor,
        output_size: int,
        input_size: int,
        per_partition_size: int,
        partition_dim: int,
        init_method: Any,
        stride: int = 1,
        return_master_weight: bool = False,
        *,
        params_dtype: torch.dtype | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        skip_set_tensor_parallel_attributes: bool = False,
    ) -> None:
        if return_master_weight:
            raise UnsupportedError("keep_master_weight_for_test=True is not covered: leave it False")
        if not skip_set_tensor_parallel_attributes:
            _mark(weight, partition_dim, stride)
        note(weight, init_method, partition_dim, stride, rank, world_size)

    return initialize


def _initialize_on_device(original: Any) -> Any:
    @functools.wraps(original)
    def initialize(
        weight: Tensor, init_method: Any, partition_dim: int, stride: int = 1, is_expert: bool = False
    ) -> None:
        from megatron.core import parallel_state

        _mark(weight, partition_dim, stride)
        group = parallel_state.get_expert_tensor_parallel_group() if is_expert else tp_group()
        note(weight, init_method, partition_dim, stride, group.rank(), group.size())

    return initialize


def _mark(weight: Tensor, partition_dim: int, stride: int) -> None:
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    set_tensor_model_parallel_attributes(tensor=weight, is_parallel=True, dim=partition_dim, stride=stride)


def _model(name: str, target: str) -> Any:
    return attribute(name, f"megatron.core.models.{target}.__init__", WHY, _model_init)


PATCHES = [
    attribute(
        "initial-weights-cpu",
        f"{LAYERS}:_initialize_affine_weight_cpu",
        WHY,
        _initialize_on_cpu,
        parameters="weight output_size input_size per_partition_size partition_dim init_method stride "
        "return_master_weight params_dtype rank world_size skip_set_tensor_parallel_attributes",
    ),
    attribute(
        "initial-weights-device",
        f"{LAYERS}:_initialize_affine_weight_gpu",
        WHY,
        _initialize_on_device,
        parameters="weight init_method partition_dim stride is_expert",
    ),
    attribute(
        "initial-weights-copies",
        "megatron.core.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
        WHY,
        _setup_embeddings,
        parameters="",
    ),
    _model("initial-weights-gpt", "gpt.gpt_model:GPTModel"),
    _model("initial-weights-bert", "bert.bert_model:BertModel"),
    _model("initial-weights-t5", "T5.t5_model:T5Model"),
]

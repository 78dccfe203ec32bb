"""Initial weights, drawn by name: nothing that was drawn before, no layout and no pipeline stage has a say.

    while a model is built      initializers note on each weight how it is drawn and cut
    when the model is complete  each is drawn whole, in float32, from a generator seeded by (seed, name), then cut

Names are those of the whole model: layers count from its first pipeline stage. A layer that is built by itself has
no name and takes a number, in order of building. `seed` is what `torch.manual_seed` was last given; where pipeline
stages differ in it, as in Megatron-LM's scripts, it is the first stage's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patches.call_site import tp_group
from patches.contract import Contract, UnsupportedError
from patches.registry import REGISTRY, attribute

__all__ = ["PATCHES", "by_name", "global_names", "note", "seed"]

LAYERS = "megatron.core.tensor_parallel.layers"
NOTE = "_patches_draw"
SHARED = "embedding.word_embeddings.weight"  # the name of both copies, where two pipeline stages hold one
WHY = "what is drawn from a shared generator follows from all that was drawn before, in shapes that TP changes"

_building: ContextVar[bool] = ContextVar("a model is being built", default=False)


@dataclass(frozen=True)
class Draw:
    """How a weight is made: whole by `init_method`, then cut into `size` shards along `dim`, `rank` being kept.

    `stride`: a shard is made of one piece from each of so many equal parts, as of gate and up in [gate_r | up_r].
    """

    init_method: Callable[[Tensor], Any]
    dim: int = 0
    stride: int = 1
    rank: int = 0
    size: int = 1

    def into(self, weight: Tensor, seed: int, name: str) -> None:
        """Draw the weight called `name` and keep this rank's shard of it in `weight`."""
        shape = list(weight.shape)
        shape[self.dim] *= self.size
        whole = torch.empty(shape, dtype=torch.float32, device=weight.device)
        with _seeded(f"{seed} {name}", weight.device):
            self.init_method(whole)
        shards = whole.chunk(self.size * self.stride, self.dim)[self.rank :: self.size]
        with torch.no_grad():
            weight.copy_(torch.cat(shards, self.dim))


def note(
    weight: Tensor,
    init_method: Callable[[Tensor], Any],
    dim: int,
    stride: int = 1,
    rank: int | None = None,
    size: int | None = None,
) -> None:
    """Have a weight that is cut along `dim` drawn when its model is complete; at once where none is being built.

    `rank` of `size` ranks this is; if not given, as in Megatron's tensor-parallel group.
    """
    if rank is None or size is None:
        rank, size = tp_group().rank(), tp_group().size()
    draw = Draw(_unnoted(init_method), dim, stride, rank, size)
    if _building.get():
        setattr(weight, NOTE, draw)
    else:
        draw.into(weight, seed(weight.device), f"layer {next(REGISTRY.unnamed)}")


def seed(device: torch.device) -> int:
    """The seed of a device's default generator, on all pipeline stages that of the first."""
    from megatron.core import parallel_state

    own = torch.cuda.initial_seed() if device.type == "cuda" else torch.initial_seed()
    if not parallel_state.model_parallel_is_initialized():
        return own
    group, answer = parallel_state.get_pipeline_model_parallel_group(), [own]
    if group.size() > 1:
        torch.distributed.broadcast_object_list(answer, parallel_state.get_pipeline_model_parallel_first_rank(), group)
    return answer[0]


def global_names(model: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Like `named_parameters`, with the numbers that layers have in the whole model."""
    for name, parameter in model.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, child in model.named_children():
        if isinstance(model, torch.nn.ModuleList) and hasattr(child, "layer_number"):
            name = str(int(child.layer_number) - 1)  # type: ignore[arg-type]
        yield from global_names(child, f"{prefix}{name}.")


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


@contextlib.contextmanager
def _seeded(key: str, device: torch.device) -> Iterator[None]:
    """Generators follow `key` alone, and are afterwards what they were before."""
    cuda = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        torch.default_generator.manual_seed(number)
        if cuda:
            torch.cuda.manual_seed(number)
        yield


class _Noted:
    """An init method of a config that also notes what it is called on."""

    def __init__(self, init_method: Callable[[Tensor], Any]) -> None:
        self.init_method = init_method

    def __call__(self, weight: Tensor) -> Any:
        if isinstance(weight, torch.nn.Parameter):
            setattr(weight, NOTE, Draw(self.init_method))
        return self.init_method(weight)


def _model_init(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if _building.get():
            original(self, *args, **kwargs)
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        seeds = {kind: seed(torch.device(kind)) for kind in sorted({"cpu", device.type})}
        token = _building.set(True)
        try:
            # Whatever draws by itself, as torch's own layers do, follows the seed, too.
            with _noting((*args, *kwargs.values())), _seeded(f"{seeds[device.type]}", device):
                original(self, *args, **kwargs)
        finally:
            _building.reset(token)
        for name, parameter in global_names(self):
            draw = vars(parameter).pop(NOTE, None)
            if draw is not None:
                if getattr(parameter, "shared_embedding", False):
                    name = SHARED
                draw.into(parameter, seeds[parameter.device.type], name)
        self.patches_seeds = seeds

    return __init__


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
        setattr(config, name, _Noted(init_method))
    try:
        yield
    finally:
        for config, name, init_method in found:
            setattr(config, name, init_method)


def _unnoted(init_method: Any) -> Any:
    return init_method.init_method if isinstance(init_method, _Noted) else init_method


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
        _mark(weight, partition_dim, stride)
        note(weight, init_method, partition_dim, stride)

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
    _model("initial-weights-gpt", "gpt.gpt_model:GPTModel"),
    _model("initial-weights-bert", "bert.bert_model:BertModel"),
    _model("initial-weights-t5", "T5.t5_model:T5Model"),
]

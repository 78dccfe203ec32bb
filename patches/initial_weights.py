"""Initial weights, drawn by name: they do not depend on what was drawn before, on the layout or on pipeline stages.

    while a model is built      initializers note on each weight how it is drawn and cut
    when the model is complete  each is drawn whole, in float32, from a generator seeded by (seed, name), then cut

Names are those of the whole model: layers count from its first pipeline stage. A layer that is built by itself has
no name and takes a number, in order of building on its stage. `seed` is what `torch.manual_seed` was last given; where
pipeline stages differ in it, as in Megatron-LM's scripts, it is the first stage's for what has a name.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patches.call_site import tp_group
from patches.contract import UnsupportedError
from patches.order.backend import training_device
from patches.registry import REGISTRY

__all__ = ["DRAWN", "WHY", "Noted", "drawn_by_name", "is_building", "note"]

NOTE = "_patches_draw"
DRAWN = "_patches_drawn"  # of a weight that was noted, then drawn
SHARED = "embedding.word_embeddings.weight"  # the name of both copies, where two pipeline stages hold one
WHY = "what is drawn from a shared generator follows from all that was drawn before, in shapes that TP changes"

_building: ContextVar[bool] = ContextVar("a model is being built", default=False)


@dataclass(frozen=True)
class Draw:
    """How a weight is made: whole by `init_method`, then cut.

    Args:
        init_method: fills a tensor, in place.
        dim: dimension that is cut.
        stride: how many equal parts a shard has a piece of each of, as of gate and up in [gate_r | up_r].
        rank: of the shard that is kept.
        size: number of shards.
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
    """Have a weight drawn when its model is complete; at once where none is being built.

    Args:
        init_method, dim, stride: as of `Draw`.
        rank, size: as of `Draw`; if not given, those of Megatron's tensor-parallel group.
    """
    if rank is None or size is None:
        rank, size = tp_group().rank(), tp_group().size()
    if isinstance(init_method, Noted):
        init_method = init_method.init_method
    draw = Draw(init_method, dim, stride, rank, size)
    setattr(weight, DRAWN, True)
    if _building.get():
        setattr(weight, NOTE, draw)
    else:
        draw.into(weight, _own_seed(weight.device), _next_number())


class Noted:
    """An init method of a config that also notes what it is called on."""

    def __init__(self, init_method: Callable[[Tensor], Any]) -> None:
        self.init_method = init_method

    def __call__(self, weight: Tensor) -> Any:
        if isinstance(weight, torch.nn.Parameter):
            setattr(weight, NOTE, Draw(self.init_method))
        return self.init_method(weight)


def is_building() -> bool:
    """Whether a model is being built by `drawn_by_name`."""
    return _building.get()


@contextlib.contextmanager
def drawn_by_name(model: torch.nn.Module) -> Iterator[None]:
    """Draw the weights of `model`, which is built inside, by name when it is complete."""
    device = training_device()
    seeds = {kind: _seed(torch.device(kind)) for kind in sorted({"cpu", device.type})}
    token = _building.set(True)
    try:
        # Whatever draws by itself, as torch's own layers do, follows the seed, too.
        with _seeded(f"{seeds[device.type]}", device):
            yield
    finally:
        _building.reset(token)
    for name, parameter in _global_names(model):
        draw = vars(parameter).pop(NOTE, None)
        if draw is not None:
            if getattr(parameter, "shared_embedding", False):
                name = SHARED
            draw.into(parameter, seeds[parameter.device.type], name)
    model.patches_seeds = seeds  # type: ignore[assignment]


def _next_number() -> str:
    """Instead of a name, for a layer outside of a model: its number among those of its pipeline stage."""
    from megatron.core import parallel_state

    number, stage = f"layer {next(REGISTRY.unnamed)}", 0
    if parallel_state.model_parallel_is_initialized():
        stage, stages = (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        if stages > 1 and REGISTRY.contract is not None and REGISTRY.contract.order_free:
            raise UnsupportedError(
                f"a layer outside of GPTModel, BertModel and T5Model with pipeline_model_parallel_size={stages} is not "
                "covered by batch='order-free', since stages draw its weights by numbers of their own: use one stage"
            )
    return f"{number} of stage {stage}" if stage else number


def _own_seed(device: torch.device) -> int:
    return torch.cuda.initial_seed() if device.type == "cuda" else torch.initial_seed()


def _seed(device: torch.device) -> int:
    """The seed of a device's default generator, on all pipeline stages that of the first."""
    from megatron.core import parallel_state

    own = _own_seed(device)
    if not parallel_state.model_parallel_is_initialized():
        return own
    group, answer = parallel_state.get_pipeline_model_parallel_group(), [own]
    if group.size() > 1:
        torch.distributed.broadcast_object_list(answer, parallel_state.get_pipeline_model_parallel_first_rank(), group)
    return answer[0]


def _global_names(model: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Like `named_parameters`, with the numbers that layers and experts have in the whole model."""
    for name, parameter in model.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, child in model.named_children():
        if isinstance(model, torch.nn.ModuleList) and hasattr(child, "layer_number"):
            name = str(int(child.layer_number) - 1)  # type: ignore[arg-type]
        if name == "local_experts" and hasattr(model, "ep_group"):
            experts: Any = child
            first = vars(model)["ep_group"].rank() * len(experts)
            for number, expert in enumerate(experts, first):
                yield from _global_names(expert, f"{prefix}{name}.{number}.")
            continue
        if hasattr(child, "num_gemms") and hasattr(model, "ep_group"):  # one layer of all experts, named as theirs
            layer: Any = child
            first = vars(model)["ep_group"].rank() * layer.num_gemms
            for own, parameter in layer.named_parameters():
                kind = own.rstrip("0123456789")
                yield f"{prefix}local_experts.{first + int(own.removeprefix(kind))}.{name}.{kind}", parameter
            continue
        yield from _global_names(child, f"{prefix}{name}.")


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

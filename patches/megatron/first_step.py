"""Before the first update: the model was built under the patches, and tensor-parallel ranks agree on what they share.

That is replicated weights, and what these came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from patches.call_site import contract
from patches.contract import UnsupportedError
from patches.initial_weights import DRAWN

__all__ = ["require_agreement"]

SEEN = "_patches_agreed"


def require_agreement(chunks: Sequence[torch.nn.Module], group: Any) -> None:
    """Once a model, raise `UnsupportedError` where it is older than the patches, or ranks of `group` hold different
    values of one thing, then on all of them.

    Shards of weights are not compared: no two ranks hold the same.
    """
    if getattr(chunks[0], SEEN, False):
        return
    setattr(chunks[0], SEEN, True)
    _refuse_older_layers(chunks)
    own = dict(_held(chunks))
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, own, group=group)
    for name, value in everyone[0].items():
        others = [rank for rank, held in enumerate(everyone) if held.get(name) != value]
        if others:
            ranks = ", ".join(map(str, others))
            raise UnsupportedError(
                f"tensor-parallel ranks {ranks} have another {name} than rank 0 at the first step: training would "
                "depend on TP; seed all of them alike, and build or load the same model on each"
            )


def _refuse_older_layers(chunks: Sequence[torch.nn.Module]) -> None:
    from megatron.core.tensor_parallel import layers

    kinds = (layers.ColumnParallelLinear, layers.RowParallelLinear, layers.VocabParallelEmbedding)
    for name, module in (named for chunk in chunks for named in chunk.named_modules()):
        weight = getattr(module, "weight", None)
        if isinstance(module, kinds) and weight is not None and not hasattr(weight, DRAWN):
            raise UnsupportedError(
                f"{name} was built before patches.enable(), so that its initial weights depend on TP: build the model "
                "after it"
            )


def _held(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Any]]:
    yield "contract of the patches", str(contract())
    yield "torch.get_default_dtype()", str(torch.get_default_dtype())
    for number, chunk in enumerate(chunks):
        for module in chunk.modules():
            if hasattr(module, "patches_seeds"):
                yield f"seed of model {number}", module.patches_seeds
        for name, parameter in chunk.named_parameters():
            if not getattr(parameter, "tensor_model_parallel", False):
                yield f"{name} (model {number})" if number else name, _digest(parameter)


def _digest(parameter: torch.Tensor) -> str:
    values = parameter.detach().contiguous().view(-1).view(torch.uint8).cpu()
    return hashlib.blake2b(values.numpy().tobytes(), digest_size=16).hexdigest()

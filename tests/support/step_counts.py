"""What a training step really does on a rank, counted: products, bytes that are sent, buffers of sums over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe.router import TopKRouter
from torch.utils._python_dispatch import TorchDispatchMode

from patches.megatron.first_step import require_agreement
from patches.ops.sharded import Shards
from patches.order.exact import products
from tests.support.ranks import on_ranks
from tpcheck.config.schema import RunConfig
from tpcheck.cost.terms import step, total
from tpcheck.run import model
from tpcheck.run.model import build_model, build_optimizer, train_step, transformer_config
from tpcheck.run.train import enable_patches

__all__ = ["check_step", "counted"]

SCALARS = 5  # elements of the gradient norm and of flags, which the account leaves out
# Bytes that a rank sends, as multiples of (size - 1) / size of the whole tensor's.
VOLUMES = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "alltoall_base_": 1}


def check_step(config: RunConfig) -> None:
    """Compare the account of a step with what every rank really does."""
    account = step(config)
    for counts in on_ranks(config.world_size, counted, config):
        assert counts.flops == pytest.approx(total(account, "flops", config.strategy), abs=0.5)
        assert counts.bytes == pytest.approx(total(account, "bytes", config.strategy), abs=0.5)
        assert counts.buffers == total(account, "memory", config.strategy)


@dataclass
class Counts:
    flops: int = 0
    bytes: float = 0.0
    buffers: int = 0  # the most bytes held for one sum over ranks
    held: int | None = None  # bytes held for the one under way


class Counting(TorchDispatchMode):
    """Counts what every collective sends and, in a stock run, ATen's products."""

    def __init__(self, counts: Counts, strategy: str) -> None:
        super().__init__()
        self.counts, self.products, self.tree = counts, strategy == "stock", strategy == "tree"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = function._schema.name.split("::")
        if namespace == "c10d":
            self._collective(name, args)
        elif self.products and name in ("mm", "bmm", "addmm", "baddbmm"):
            count_product(self.counts, *args[name.startswith(("add", "badd")) :][:2])
        return function(*args, **(kwargs or {}))

    def _collective(self, name: str, args: Any) -> None:
        tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, torch.Tensor)]
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        replicas = (
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_expert_data_parallel_group(),
        )
        if group.group_name in [other.group_name for other in replicas]:
            return
        if all(tensor.dtype == torch.int64 for tensor in tensors):  # tokens of experts, counted
            return
        whole = max(tensor.nbytes for tensor in tensors)
        if group.size() == 1 or max(tensor.numel() for tensor in tensors) <= SCALARS:
            return
        assert name in VOLUMES, f"a collective that the account does not know: {name}"
        self.counts.bytes += VOLUMES[name] * (group.size() - 1) / group.size() * whole
        if self.counts.held is not None and name != "allreduce_":
            if name == "alltoall_base_":  # roots sent and received; an all-gather brings the result
                self.counts.held += 2 * whole
            elif not self.tree:
                self.counts.held += whole
            elif not self.counts.held:  # an all-gather of the roots themselves
                self.counts.held += whole + whole // group.size()


def count_product(counts: Counts, a: torch.Tensor, b: torch.Tensor) -> None:
    counts.flops += 2 * a.numel() * b.shape[-1]


def counted(config: RunConfig) -> Counts:
    """One training step of megatron-core's own model on this rank; experts get as many rows as each other."""
    enable_patches(config)
    parallel_state.initialize_model_parallel(
        config.tp, context_parallel_size=config.cp, expert_model_parallel_size=config.ep,
        expert_tensor_parallel_size=config.etp,
    )  # fmt: skip
    TopKRouter.routing = evenly
    for name in ("_gather_along_first_dim", "_reduce_scatter_along_first_dim"):  # by gloo, uneven parts go another way
        even = getattr(mappings, name)
        setattr(mappings, name, lambda x, group, *sizes, even=even: even(x, group))
    model._whole_sequences = lambda losses: losses  # which are gathered for the record alone
    _, pieces = build_model(config, transformer_config(config))
    optimizer = build_optimizer(config, pieces)
    counts = Counts()
    if config.strategy != "stock":
        count_patches(counts)
        require_agreement(pieces, parallel_state.get_tensor_model_parallel_group())  # no part of any later step
    tokens = torch.randint(0, config.model.vocab_size, (config.micro_batch_size, config.seq_length + 1))
    with Counting(counts, config.strategy):
        train_step(config, pieces, optimizer, [tokens] * config.microbatches)
    return counts


def count_patches(counts: Counts) -> None:
    """Count every leaf product, and what is held during one sharded sum."""

    def product_of(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(a: torch.Tensor, b: torch.Tensor, *dtype: torch.dtype) -> Any:
            count_product(counts, a, b)
            return original(a, b, *dtype)

        return call

    def with_buffers(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts.held = 0
            result = original(*args, **kwargs)
            counts.buffers, counts.held = max(counts.buffers, counts.held), None
            return result

        return call

    products.exact_product = product_of(products.exact_product)
    for name in ("begin_product", "begin_sum_over"):
        setattr(Shards, name, with_buffers(getattr(Shards, name)))


def evenly(router: Any, logits: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A choice for `TopKRouter.routing` that gives every expert as many of a rank's tokens as every other."""
    logits = logits.flatten(0, -2)
    first = torch.arange(logits.shape[0]) * router.topk
    places = (first.unsqueeze(1) + torch.arange(router.topk)) % logits.shape[1]
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, places, True)
    return logits.softmax(-1) * chosen, chosen

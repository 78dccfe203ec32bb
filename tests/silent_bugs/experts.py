"""Bugs in mixtures of experts: who gets which tokens, weights and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher as Dispatcher
from torch import Tensor

from patches import initial_weights
from tests.silent_bugs.case import FINALIZE, MIXTURE, TIGHT, around, bug, tp_size
from tests.support.traces import replaced

EP2, EP2_OF_4 = {"dp": 2, "ep": 2}, {"dp": 4, "ep": 2, "micro_batch_size": 1}
SP2 = {"tp": 2, "sequence_parallel": True, "ep": 2, "etp": 1}
BALANCED = {**MIXTURE, "experts": {"number": 8, "per_token": 2, "ffn_hidden_size": 72, "balance_loss": 1.0}}


def syncing_experts_over(group: Callable[[], Any]) -> Any:
    """The reduction of experts' gradients over another group of ranks; none if it is None."""

    def wrap(start: Callable[..., None]) -> Callable[..., None]:
        def misled(self: Any, *args: Any, **kwargs: Any) -> None:
            if all(getattr(parameter, "allreduce", True) for parameter in self.params):
                start(self, *args, **kwargs)
            elif (other := group()) is not None:
                with replaced(self, "data_parallel_group", other):
                    start(self, *args, **kwargs)

        return misled

    return around(BucketGroup, "start_grad_sync", wrap)


@bug("grad *.experts.*", layout=EP2_OF_4, model=MIXTURE)
def expert_gradients_not_reduced() -> Iterator[None]:
    """Ranks that hold the same experts update them each with the gradient of its own tokens."""
    with syncing_experts_over(lambda: None):
        yield


@bug("grad *.experts.*", layout=EP2_OF_4, model=MIXTURE)
def expert_gradients_reduced_over_the_wrong_group() -> Iterator[None]:
    """Experts' gradients are summed over expert-parallel ranks, which hold other experts."""
    with syncing_experts_over(parallel_state.get_expert_model_parallel_group):
        yield


@bug("clip gradient norm", layout=EP2, model=MIXTURE, optimizer=TIGHT, dtype="fp32")
def norm_omits_experts() -> Iterator[None]:
    """The gradient norm that clipping uses is that of the dense parameters."""
    with replaced(ChainedOptimizer, "get_grad_norm", lambda self: self.chained_optimizers[0].get_grad_norm()):
        yield


@bug("grad *.router.weight", "dout *.router*", "din *.router", "dout *.pre_mlp_layernorm", layout=SP2, model=BALANCED)
def auxiliary_loss_scaled_by_local_tokens() -> Iterator[None]:
    """The balance loss is divided by the number of sequence-parallel ranks, as if it were a sum over their tokens."""

    def wrap(attach: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def scaled(self: Any, x: Tensor, coefficient: float, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return attach(self, x, coefficient, loss / tp_size(), *args, **kwargs)

        return scaled

    with around(TopKRouter, "attach_and_log_load_balancing_loss", wrap):
        yield


@bug("out *.mlp", "dout *.router", layout=EP2, model=MIXTURE)
def results_combined_with_other_tokens_probabilities() -> Iterator[None]:
    """An expert's rows are weighted by the probabilities that came for the rows of another rank."""

    def wrap(dispatch: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def mixed_up(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            rows, probabilities = dispatch(*args, **kwargs)
            return rows, probabilities.flip(0)

        return mixed_up

    with around(Dispatcher, "token_dispatch", wrap):
        yield


@bug("out *.mlp", layout=EP2, model=MIXTURE)
def rows_given_to_the_neighbouring_expert() -> Iterator[None]:
    """A rank's experts take each other's numbers of rows, so that some rows go to the wrong one."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def shifted(self: Any, rows: Tensor, sizes: Tensor, probabilities: Tensor) -> Any:
            return forward(self, rows, sizes.roll(1), probabilities)

        return shifted

    with around(SequentialMLP, "forward", wrap):
        yield


@bug("start *.experts.*", layout=EP2, model=MIXTURE)
def experts_initialised_from_a_ranks_own_numbers() -> Iterator[None]:
    """Every expert-parallel rank draws the same weights for its first, second, … expert."""

    def by_own_number(model: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Parameter]]:
        return model.named_parameters()

    with replaced(initial_weights, "_global_names", by_own_number):
        yield


@bug("grad *.router.weight", layout=SP2, model=MIXTURE)
def router_gradient_not_reduced_over_the_sequence() -> Iterator[None]:
    """Under sequence parallelism the router's gradient is each rank's sum over its own tokens."""

    def wrap(reduce: Callable[..., None]) -> Callable[..., None]:
        def without_routers(model: Any, *args: Any, **kwargs: Any) -> None:
            routers = [p for chunk in model for name, p in chunk.named_parameters() if "router" in name]
            for parameter in routers:
                parameter.sequence_parallel = False
            reduce(model, *args, **kwargs)
            for parameter in routers:
                parameter.sequence_parallel = True

        return without_routers

    with around(FINALIZE, "_allreduce_non_tensor_model_parallel_grads", wrap):
        yield


@contextlib.contextmanager
def last_expert_idle() -> Iterator[None]:
    """No token is ever sent to the last expert."""

    def wrap(routing: Callable[..., Any]) -> Callable[..., Any]:
        def elsewhere(self: Any, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            last = torch.arange(logits.shape[-1]) == logits.shape[-1] - 1
            return routing(self, logits.masked_fill(last, float("-inf")), *args, **kwargs)

        return elsewhere

    with around(TopKRouter, "routing", wrap):
        yield


@bug(
    "update *.local_experts.7.*", layout=EP2, model=MIXTURE, optimizer={"lr": 0.01}, dtype="fp32",
    world=last_expert_idle, source="https://github.com/huggingface/transformers/pull/40530",
)  # fmt: skip
def idle_experts_have_no_gradient() -> Iterator[None]:
    """An expert that no token went to has no gradient instead of zeros, so that its weights don't decay."""

    def wrap(step: Callable[..., bool]) -> Callable[..., bool]:
        def passing_over_idle(self: Any) -> bool:
            """As a fused Adam does, which counts steps for all parameters of a group at once."""
            every = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            idle = [p for p in every if not getattr(p, "allreduce", True) and not p.grad.any()]
            before = [parameter.detach().clone() for parameter in idle]
            found = step(self)
            for parameter, weight in zip(idle, before, strict=True):
                parameter.data.copy_(weight)
            return found

        return passing_over_idle

    with around(FP32Optimizer, "step_with_ready_grads", wrap):
        yield

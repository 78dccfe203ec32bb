"""Bugs in which ranks or stages are meant, and in where their weights begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
from megatron.core.optimizer import optimizer as mcore_optimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from tests.silent_bugs.case import (
    DP2,
    FINALIZE,
    PP2,
    QWEN3,
    TIGHT,
    TP2,
    around,
    bug,
)
from tests.silent_bugs.settings import pieces_with
from tests.support.traces import replaced


@bug(
    "grad *", layout={"tp": 2, "dp": 2}, kind="another group",
    source="https://github.com/ByteDance-Seed/VeOmni/pull/1115",
)  # fmt: skip
def gradients_reduced_over_the_tensor_parallel_group() -> Iterator[None]:
    """Gradients are summed over tensor parallelism, where data parallelism is due."""

    def wrap(start: Callable[..., None]) -> Callable[..., None]:
        def other(self: Any, *args: Any, **kwargs: Any) -> None:
            self.data_parallel_group = parallel_state.get_tensor_model_parallel_group()
            start(self, *args, **kwargs)

        return other

    with around(BucketGroup, "start_grad_sync", wrap):
        yield


@bug("grad *layernorm.weight", layout={"tp": 2, "dp": 2, "sequence_parallel": True}, kind="another group")
def norm_gradients_reduced_over_the_data_parallel_group() -> Iterator[None]:
    """Under sequence parallelism the norms' gradients are summed over data parallelism once more, not over TP."""

    def wrap(reduce: Callable[..., None]) -> Callable[..., None]:
        def other(pieces: Any, config: Any, tp_group: Any = None, *args: Any, **kwargs: Any) -> None:
            reduce(pieces, config, parallel_state.get_data_parallel_group(), *args, **kwargs)

        return other

    with around(FINALIZE, "_allreduce_non_tensor_model_parallel_grads", wrap):
        yield


@bug(
    "clip gradient *", layout={"tp": 2, "dp": 2}, distributed_optimizer=True, optimizer=TIGHT, kind="another group",
    source="https://github.com/NVIDIA/Megatron-LM/pull/5916",
)  # fmt: skip
def norm_over_the_data_parallel_group_only() -> Iterator[None]:
    """The gradient norm is summed over data parallelism alone: a tensor-parallel rank's is of its own shards."""

    def wrap(norm: Callable[..., float]) -> Callable[..., float]:
        def narrow(grads: Any, *args: Any, **kwargs: Any) -> float:
            return norm(grads, grad_stats_parallel_group=parallel_state.get_data_parallel_group())

        return narrow

    with around(mcore_optimizer, "get_grad_norm_fp32", wrap):
        yield


@bug(
    "grad embedding.word_embeddings.weight", layout=PP2, model={**QWEN3, "tied": True},
    kind="tied embeddings over a pipeline", source="https://github.com/NVIDIA/Megatron-LM/issues/844",
)  # fmt: skip
def tied_gradients_not_summed_over_stages() -> Iterator[None]:
    """First and last stage each update their copy of the tied embedding with their own gradient."""
    with replaced(FINALIZE, "_allreduce_word_embedding_grads", lambda *args, **kwargs: None):
        yield


@bug("dout *", "din *", layout=PP2, micro_batch_size=1, kind="pipeline")
def stages_hand_back_gradients_halved() -> Iterator[None]:
    """The gradient that a stage hands back to the one before is divided by the number of stages."""

    def wrap(backward: Callable[..., Any]) -> Callable[..., Any]:
        def halved(*args: Any, **kwargs: Any) -> Any:
            grad = backward(*args, **kwargs)
            return grad / 2 if isinstance(grad, Tensor) else [g if g is None else g / 2 for g in grad]

        return halved

    with around(schedules, "backward_step", wrap):
        yield


@bug("out *", layout=PP2, kind="pipeline")
def hidden_states_rounded_between_stages() -> Iterator[None]:
    """Hidden states lose three of their bits where they are sent to the next stage."""

    def wrap(receive: Callable[..., Any]) -> Callable[..., Any]:
        def rounded(self: Any, tensor: Any) -> None:
            if isinstance(tensor, Tensor):
                tensor.data.copy_((tensor.detach().view(torch.int16) & ~7).view(tensor.dtype))
            receive(self, tensor)

        return rounded

    from megatron.core.models.gpt.gpt_model import GPTModel

    with around(GPTModel, "set_input_tensor", _of_lists(wrap)):
        yield


def _of_lists(wrap: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(receive: Callable[..., Any]) -> Callable[..., Any]:
        inner = wrap(receive)

        def call(self: Any, tensor: Any) -> None:
            inner(self, tensor[0] if isinstance(tensor, list) else tensor)

        return call

    return wrapped


@bug("start *.linear_proj.weight", "start *.linear_fc2.weight", layout=TP2, kind="initial weights")
def output_weights_not_scaled_by_depth() -> Iterator[None]:
    """Weights that add to the residual stream are drawn √(2·layers) times too large."""

    def scale(gpt: Any) -> None:
        for name, parameter in gpt.named_parameters():
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                parameter.data.mul_(2.0)

    with pieces_with(scale):
        yield


@bug(
    "start *layernorm.weight", layout=TP2, kind="initial weights",
    source="https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5396",
)  # fmt: skip
def norm_weights_begin_at_zero() -> Iterator[None]:
    """The final norm's weight begins at nearly 0, as if it were centered there."""

    def zero(gpt: Any) -> None:
        gpt.decoder.final_layernorm.weight.data.fill_(0.01)

    with pieces_with(zero):
        yield


@bug("start *", layout=DP2, kind="unequal data-parallel ranks")
def data_parallel_ranks_begin_apart() -> Iterator[None]:
    """Data-parallel rank 1 draws the output layer from a seed of its own, and nobody broadcasts."""

    def redraw(gpt: Any) -> None:
        if parallel_state.get_data_parallel_rank() == 1:
            gpt.output_layer.weight.data.mul_(1.01)

    with pieces_with(redraw):
        yield


@bug("weight *", "state.* *", "update *", "start *", layout=DP2, kind="unequal data-parallel ranks")
def data_parallel_ranks_drift_apart() -> Iterator[None]:
    """One data-parallel rank's norms get a little noise at every update."""

    def wrap(copy: Callable[..., None]) -> Callable[..., None]:
        def noisy(self: Any) -> None:
            copy(self)
            if parallel_state.get_data_parallel_rank() == 1:
                for group in self.float16_groups:
                    for p in group:
                        if p.dim() == 1:
                            p.data.mul_(1.01)

        return noisy

    with around(Float16OptimizerWithFloat16Params, "_copy_main_params_to_model_params", wrap):
        yield

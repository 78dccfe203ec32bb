"""Small systematic errors, bugs in which group or part of a model is meant, and in where weights begin."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
from megatron.core.optimizer import optimizer as mcore_optimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from tests.silent_bugs.case import GPT2, QWEN3, around, bug, during, tp_rank
from tests.silent_bugs.settings import pieces_with
from tests.support.traces import replaced
from tpcheck.run import model

TP2, DP2, PP2 = {"tp": 2}, {"dp": 2}, {"pp": 2}
FINALIZE = importlib.import_module("megatron.core.distributed.finalize_model_grads")
TIGHT = {"clip_grad": 0.05}


def finalized(change: Callable[[str, Any], None]) -> Any:
    """`change(name, parameter)` of every parameter whose gradient has just been finalized."""

    def wrap(finalize: Callable[..., None]) -> Callable[..., None]:
        def changed(pieces: Any, *args: Any, **kwargs: Any) -> None:
            finalize(pieces, *args, **kwargs)
            for piece in pieces:
                for name, parameter in piece.named_parameters():
                    change(name, parameter)

        return changed

    return around(model, "finalize_model_grads", wrap)


@bug("grad *.linear_fc1.weight", layout=TP2, kind="one gradient, by a percent")
def one_gradient_a_percent_too_large() -> Iterator[None]:
    """The gradient of layer 0's first MLP weight is 1.01 times what it should be."""

    def scale(name: str, parameter: Any) -> None:
        if "layers.0.mlp.linear_fc1.weight" in name:
            parameter.main_grad.mul_(1.01)

    with finalized(scale):
        yield


@bug("grad *.linear_fc2.weight", layout=TP2, kind="one rank's gradient, by a percent")
def one_ranks_gradient_a_percent_too_large() -> Iterator[None]:
    """Rank 1's part of every second MLP weight's gradient is 1.01 times what it should be."""

    def scale(name: str, parameter: Any) -> None:
        if "linear_fc2.weight" in name and tp_rank() == 1:
            parameter.main_grad.mul_(1.01)

    with finalized(scale):
        yield


@bug("grad *", layout=DP2, dtype="fp32", kind="all gradients, by a thousandth")
def all_gradients_a_thousandth_too_small() -> Iterator[None]:
    """Gradients of all parameters are 0.999 times what they should be: a loss scale that is not undone exactly."""

    def scale(name: str, parameter: Any) -> None:
        parameter.main_grad.mul_(0.999)

    with finalized(scale):
        yield


@bug("grad *", layout=TP2, kind="all gradients, by percents")
def gradients_of_all_layers_three_percent_too_large() -> Iterator[None]:
    """The gradients of all matrices in the layers are 1.03 times what they should be."""

    def scale(name: str, parameter: Any) -> None:
        if "layers." in name and parameter.dim() == 2:
            parameter.main_grad.mul_(1.03)

    with finalized(scale):
        yield


@bug("grad *.linear_qkv.weight", layout=TP2, kind="rows of a weight")
def gradient_of_one_head_off() -> Iterator[None]:
    """The rows of one query head in the QKV weight's gradient are off by a third; they hold a hundredth of its norm."""

    def scale(name: str, parameter: Any) -> None:
        if "layers.1.self_attention.linear_qkv.weight" in name and tp_rank() == 0:
            parameter.main_grad[:8].mul_(0.67)

    with finalized(scale):
        yield


@bug(
    "state.exp_avg*", layout=TP2, kind="moments in bf16",
    source="https://github.com/vllm-project/speculators/pull/899",
)  # fmt: skip
def moments_kept_in_bf16() -> Iterator[None]:
    """After every step Adam's moments are rounded to bf16."""

    def wrap(step: Callable[..., Any]) -> Callable[..., Any]:
        def rounded(self: Any, *args: Any, **kwargs: Any) -> Any:
            answer = step(self, *args, **kwargs)
            for state in self.state.values():
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key].copy_(state[key].bfloat16())
            return answer

        return rounded

    with around(torch.optim.AdamW, "step", wrap):
        yield


@bug(
    "state.main *", "update *", "weight *", layout=TP2, kind="main parameters",
    source="https://github.com/TensorAuto/OpenTau/issues/185",
)  # fmt: skip
def main_parameters_rebuilt_at_every_step() -> Iterator[None]:
    """Every step begins from the rounded weights: what an update leaves below bf16 is lost."""

    def wrap(copy: Callable[..., None]) -> Callable[..., None]:
        def rebuilt(self: Any) -> None:
            copy(self)
            self._copy_model_params_to_main_params()

        return rebuilt

    with around(Float16OptimizerWithFloat16Params, "_copy_main_params_to_model_params", wrap):
        yield


@bug("update *", "state.main *", layout=TP2, kind="updates of one tensor")
def one_update_too_large() -> Iterator[None]:
    """The main parameter of the output layer moves 1.02 times as far as Adam says."""

    def wrap(step: Callable[..., Any]) -> Callable[..., Any]:
        def farther(self: Any, *args: Any, **kwargs: Any) -> Any:
            chosen = [p for group in self.param_groups for p in group["params"] if p.shape[:1] == (192,)][-1]
            before = chosen.detach().clone()
            answer = step(self, *args, **kwargs)
            chosen.data.add_(0.02 * (chosen.data - before))
            return answer

        return farther

    with around(torch.optim.AdamW, "step", wrap):
        yield


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


@bug(
    "out *.core_attention", "out *.scale_mask_softmax", layout=TP2, model={**QWEN3, "num_query_groups": 4},
    kind="key and value heads", source="https://github.com/onnx/onnx/pull/7274",
)  # fmt: skip
def keys_and_values_tiled_not_repeated() -> Iterator[None]:
    """Key and value heads are laid out as 0 1 0 1 for query heads that need 0 0 1 1."""

    def tiled(x: Tensor, repeats: int, dim: int) -> Tensor:
        return torch.cat([x] * repeats, dim)

    with during(DotProductAttention, "forward", Tensor, "repeat_interleave", tiled):
        yield


@bug("out *", layout=TP2, dtype="fp32", kind="products in bf16")
def products_in_bf16() -> Iterator[None]:
    """A float32 run multiplies the MLP's matrices in bf16, as an autocast left on would."""
    from megatron.core.transformer.mlp import MLP

    product = torch.matmul

    def coarse(x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        return product(x.bfloat16(), y.bfloat16(), **kwargs).float()

    with during(MLP, "forward", torch, "matmul", coarse):
        yield


@bug("grad *", layout=DP2, kind="sums in bf16", source="https://github.com/NVIDIA/Megatron-LM/issues/502")
def gradients_communicated_in_bf16() -> Iterator[None]:
    """Gradients are rounded to bf16 before data-parallel ranks add them, and their sum after."""

    def wrap(finish: Callable[..., None]) -> Callable[..., None]:
        def rounded(self: Any, *args: Any, **kwargs: Any) -> None:
            finish(self, *args, **kwargs)
            for bucket in self.buckets:
                bucket.grad_data.copy_(bucket.grad_data.bfloat16())

        return rounded

    with around(BucketGroup, "finish_grad_sync", wrap):
        yield


@bug(
    "grad *", layout=TP2, micro_batch_size=1, kind="microbatches",
    source="https://github.com/TrenTorch/TrenTorch/pull/187",
)  # fmt: skip
def last_microbatch_counts_double() -> Iterator[None]:
    """The last microbatch's gradient counts once more than the others'."""

    def wrap(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(self: Any, parameter: Any) -> Callable[..., None]:
            hook, calls = make(self, parameter), []

            def counted(*unused: Any) -> None:
                calls.append(1)
                if len(calls) % 4 == 0 and parameter.grad is not None:
                    parameter.grad.mul_(2)
                hook(*unused)

            return counted

        return made

    with around(DistributedDataParallel, "_make_backward_post_hook", wrap):
        yield


@bug("out *layernorm", "settings *", layout=TP2, model=GPT2, kind="norms")
def norm_forgets_the_mean() -> Iterator[None]:
    """Layer norms divide by the root of the mean square, and do not subtract the mean."""

    def forward(self: Any, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float() + self.bias.float()).to(x.dtype)

    with replaced(torch.nn.LayerNorm, "forward", forward):
        yield


@bug("out *", layout=TP2, kind="residual stream")
def residual_a_hundredth_too_large() -> Iterator[None]:
    """A layer adds 1.01 times what came in to what the MLP makes of it."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def larger(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(self, hidden, *args, **kwargs) + 0.01 * hidden

        return larger

    with around(TransformerLayer, "_forward_mlp", wrap):
        yield


@bug("grad *", "weight *", "only*", "missing *", layout=TP2, kind="missing gradients")
def query_norm_without_gradient() -> Iterator[None]:
    """The query norm's gradient never reaches its buffer: the weight decays and nothing else."""

    def drop(name: str, parameter: Any) -> None:
        if "q_layernorm" in name:
            parameter.main_grad.zero_()

    with finalized(drop):
        yield

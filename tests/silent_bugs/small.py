"""Small systematic errors: factors near 1, low precision, one part of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from tests.silent_bugs.case import (
    DP2,
    GPT2,
    OUTPUT_LAYER_ROWS,
    QWEN3,
    TP2,
    around,
    bug,
    during,
    tp_rank,
)
from tests.support.traces import replaced
from tpcheck.run import model


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
            chosen = [p for group in self.param_groups for p in group["params"] if p.shape[:1] == (OUTPUT_LAYER_ROWS,)][
                -1
            ]
            before = chosen.detach().clone()
            answer = step(self, *args, **kwargs)
            chosen.data.add_(0.02 * (chosen.data - before))
            return answer

        return farther

    with around(torch.optim.AdamW, "step", wrap):
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

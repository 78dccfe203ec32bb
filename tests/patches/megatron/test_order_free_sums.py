"""What `batch="order-free"` does not sum is refused or counted exactly, on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

import patches
from patches.ops.bias import bias_per_token
from patches.ops.linear import GradSink, row_parallel
from patches.ops.norm import TOKENS, norm
from patches.ops.sequences import batch_sum
from patches.ops.sharded import Shards
from patches.order.grid import LIMIT
from tests.support import plain_megatron
from tests.support.ranks import on_ranks

OPTIONS: dict[str, Any] = {"seq": 16, "global_batch": 4, "micro_batch": 1, "steps": 1}


def train(before: Any, options: dict[str, Any]) -> dict[str, Any]:
    patches.enable(batch="order-free")
    before()
    return plain_megatron.train(**{**OPTIONS, **options})


def test_a_loss_that_is_a_mean_is_refused():
    def means() -> None:
        plain_megatron.forward_masked = plain_megatron.forward_step

    with pytest.raises(
        AssertionError, match="the loss function returned 2 values, a mean .*: return three, the sum over"
    ):
        on_ranks(1, train, means, {})


def scaled(factor: float) -> Any:
    def before() -> None:
        loss = plain_megatron.masked_loss

        def scaled_loss(*args: Any) -> Any:
            total, tokens, report = loss(*args)
            # One data-parallel rank of several, and the stage that has the loss, is all that sees it.
            return total * (factor if parallel_state.get_data_parallel_rank() == 0 else 1.0), tokens, report

        plain_megatron.masked_loss = scaled_loss

    return before


@pytest.mark.parametrize("factor", (4 * LIMIT, float("inf"), float("nan")))
@pytest.mark.parametrize("layout", ({"dp": 2}, {"pp": 2}), ids=str)
def test_a_gradient_that_may_not_be_exact_is_refused_by_name(factor, layout):
    options = {key: value for key, value in layout.items() if key != "dp"}
    with pytest.raises(
        AssertionError, match="batch='order-free': the gradient of .*weight, a sum over .*loss_scale"
    ) as e:
        on_ranks(
            2, train, scaled(factor), {**options, "model": {"num_layers": 2}, "ddp": {"check_for_nan_in_grad": False}}
        )
    assert "timeout" not in str(e.value)


def test_scaling_the_loss_down_is_a_way_out():
    """By a power of two that Megatron's optimizer takes back: norms are those of a loss that is not so large."""
    large = scaled(2.0**28)
    with pytest.raises(AssertionError, match="a sum over the batch's tokens"):
        on_ranks(1, train, large, {})
    scale = {"loss_scale": 2.0**-20}
    one, two = (on_ranks(ranks, train, large, {**scale, **layout})[0] for ranks, layout in ((1, {}), (2, {"tp": 2})))
    assert one == two
    plain = on_ranks(1, train, scaled(1.0), {})[0]
    norms = [float.fromhex(record["step0 gradient norm"]) for record in (one, plain)]
    assert norms[0] / 2.0**28 == pytest.approx(norms[1], rel=1e-3)  # bfloat16's subnormals end elsewhere


def misused_embedding() -> dict[str, Any]:
    """A head that multiplies by the embedding's weight itself: one part of the gradient comes through autograd."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    patches.enable(batch="order-free")
    forward = GPTModel.forward

    def with_head(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = forward(self, *args, **kwargs)
        return loss + self.embedding.word_embeddings.weight.float().sum() * 1e-3

    GPTModel.forward = with_head
    return plain_megatron.train(**OPTIONS, tied=True)


def test_a_gradient_that_comes_after_its_sum_was_rounded_is_refused():
    """Two calls of forward and backward before one update: the second would add integers to the first's float32."""

    def two_calls() -> None:
        get, micro_batches = plain_megatron.get_forward_backward_func, plain_megatron.samples

        def call_twice(**given: Any) -> Any:
            get()(**{**given, "data_iterator": micro_batches(7, 200, OPTIONS["seq"], 1, OPTIONS["global_batch"])})
            return get()(**given)

        plain_megatron.get_forward_backward_func = lambda: call_twice

    with pytest.raises(AssertionError, match="came after the batch's sums had been rounded: call zero_grad_buffer"):
        on_ranks(1, train, two_calls, {})


def test_a_part_of_a_gradient_that_nobody_adds_is_refused_by_name():
    with pytest.raises(
        AssertionError, match="word_embeddings.weight, or a part of it, is summed by a module that is not"
    ):
        on_ranks(1, misused_embedding)


def counted_zeros(batch: patches.Batch) -> float:
    from megatron.core.optimizer import optimizer

    patches.enable(batch=batch)
    parallel_state.initialize_model_parallel()
    parameters = [torch.nn.Parameter(torch.empty(size)) for size in (1 << 24, 1, 1, 1)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return optimizer.count_zeros_fp32(parameters, dist.group.WORLD)


@pytest.mark.parametrize("batch", ("ordered", "order-free"))
def test_zeros_are_counted_where_float32_ends_to_count(batch):
    assert on_ranks(1, counted_zeros, batch) == [2**24 + 3]


def test_a_parameter_outside_of_ddp_is_refused():
    with pytest.raises(patches.UnsupportedError, match=r"Parameter of shape \[2, 3\]: wrap the model in Megatron's"):
        batch_sum(torch.nn.Parameter(torch.empty(2, 3)))


@pytest.mark.parametrize("layer", ("linear", "norm", "bias"))
def test_activations_that_do_not_tell_sequences_apart_are_refused(layer):
    shards = Shards(patches.Contract(batch="order-free"))
    x, weight = torch.ones(4, 4, requires_grad=True), torch.nn.Parameter(torch.ones(4, 4))
    y = {
        "linear": lambda: row_parallel(x, weight, shards, False, GradSink()),
        "norm": lambda: norm(x, torch.nn.Parameter(torch.ones(4)), None, 1e-5, False, TOKENS, shards),
        "bias": lambda: x + bias_per_token(torch.nn.Parameter(torch.ones(4)), x.shape, shards),
    }[layer]()
    with pytest.raises(patches.UnsupportedError, match=r"activations of shape \[4, 4\] don't tell sequences apart"):
        y.sum().backward()


def test_patches_for_it_are_applied_for_it_alone():
    def named() -> set[str]:
        return {row.name for row in patches.status() if row.applied}

    with patches.enabled():
        ordered = named()
    with patches.enabled(batch="order-free"):
        free = named()
    assert ordered < free and {"batch-sums", "column-bias", "loss-per-token"} <= free - ordered
    with pytest.raises(ValueError, match="batch='none': use one of ordered, order-free"):
        patches.enable(batch="none")  # type: ignore[arg-type]

"""Bugs in losses: what they are divided by, what they leave out, what runs over a shard; and in what is random."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module import language_module
from megatron.core.tensor_parallel import cross_entropy
from torch import Tensor

from tests.silent_bugs.case import DP2, DROPOUT, TP2, around, bug, during, tp_rank, tp_size
from tests.support.traces import replaced
from tpcheck.run import model, train

SMOOTHING, Z = 0.1, 0.01
SPACE = 32  # tokens that a masked loss leaves out: in text, every fifth or so, unevenly


def with_cross_entropy(wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Any:
    """The loss of logits [s, b, vocabulary / TP] and labels [s, b] is `wrap` of the stock one."""
    return around(language_module.tensor_parallel, "vocab_parallel_cross_entropy", wrap)


@contextlib.contextmanager
def smoothed() -> Iterator[None]:
    """Label smoothing of 0.1, over the whole vocabulary at every TP size."""
    with with_cross_entropy(lambda stock: lambda logits, labels: _smoothed(stock, logits, labels, whole=True)):
        yield


def _smoothed(stock: Callable[..., Tensor], logits: Tensor, labels: Tensor, whole: bool) -> Tensor:
    """(1 - α)·loss + α·(lse - mean of the logits), the mean over the whole vocabulary or over this rank's shard."""
    loss = stock(logits.clone(), labels)
    wide = logits.float()
    own = _summed(wide.sum(-1)) / (wide.shape[-1] * tp_size()) if whole else wide.mean(-1)
    return (1 - SMOOTHING) * loss + SMOOTHING * (_lse(wide, whole=True) - own)


@contextlib.contextmanager
def with_z_loss() -> Iterator[None]:
    """0.01·lse² of all logits is added to the loss."""
    with with_cross_entropy(
        lambda stock: lambda logits, labels: stock(logits.clone(), labels) + Z * _lse(logits.float(), whole=True) ** 2
    ):
        yield


def _lse(logits: Tensor, whole: bool) -> Tensor:
    local = torch.logsumexp(logits, -1)
    if not whole or tp_size() == 1:
        return local
    top = local.detach().clone()
    torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=_tp_group())
    return torch.log(_summed(torch.exp(local - top))) + top


class _Sum(torch.autograd.Function):
    """A sum over tensor parallelism of a value that is then the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone()
        torch.distributed.all_reduce(y, group=_tp_group())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _summed(x: Tensor) -> Tensor:
    return _Sum.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def _tp_group() -> Any:
    return parallel_state.get_tensor_model_parallel_group()


@contextlib.contextmanager
def masked() -> Iterator[None]:
    """Loss is over tokens that are no spaces, summed, and divided by their number in the global batch."""

    def forward(loss: Any, batches: Iterator[Tensor], gpt: Any) -> tuple[Tensor, Any]:
        tokens = next(batches).cuda()
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
        mask = (labels != SPACE).float()

        def of(token_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return masked_loss(token_losses, mask)

        return gpt(inputs, positions, None, labels=labels), of

    def wrap(make: Callable[..., Any]) -> Callable[..., Any]:
        def per_token(config: Any) -> Any:
            made = make(config)
            made.calculate_per_token_loss = True
            return made

        return per_token

    with replaced(model, "_forward", forward), around(model, "transformer_config", wrap):
        yield


def masked_loss(token_losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kept = (token_losses.float() * kept_of(mask)).sum()
    return kept, count_of(mask).to(torch.int32), token_losses.detach().float()


def kept_of(mask: Tensor) -> Tensor:
    return mask


def count_of(mask: Tensor) -> Tensor:
    return mask.sum()


LOSSES = importlib.import_module(__name__)


@bug(
    "out model", layout=TP2, world=smoothed, kind="loss over a shard",
    source="https://github.com/NVIDIA/Megatron-LM/issues/7464",
)  # fmt: skip
def label_smoothing_over_the_shard() -> Iterator[None]:
    """Label smoothing takes the mean of the rank's own shard of the logits."""
    with with_cross_entropy(lambda world: lambda logits, labels: _smoothed(_stock(), logits, labels, whole=False)):
        yield


def _stock() -> Callable[..., Tensor]:
    return cross_entropy.vocab_parallel_cross_entropy


@bug("out model", layout=TP2, world=with_z_loss, kind="loss over a shard")
def z_loss_over_the_shard() -> Iterator[None]:
    """The z-loss takes the sum of exponentials over the rank's own shard of the vocabulary."""
    with with_cross_entropy(
        lambda world: (
            lambda logits, labels: _stock()(logits.clone(), labels) + Z * _lse(logits.float(), whole=False) ** 2
        )
    ):
        yield


@bug(
    "settings *tokens*", "grad *", layout=DP2, world=masked, kind="token counts",
    source="https://github.com/pytorch/torchtitan/pull/2206",
)  # fmt: skip
def loss_divided_by_the_ranks_own_tokens() -> Iterator[None]:
    """Each data-parallel rank divides by twice its own tokens, where the global batch's are due."""
    reduce = torch.distributed.all_reduce

    def own(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dtype == torch.int32 and x.numel() == 1:
            return x.mul_(2)
        return reduce(x, *args, **kwargs)

    with during(model, "finalize_model_grads", torch.distributed, "all_reduce", own):
        yield


@bug("settings *tokens*", "loss *", "dout model", layout=DP2, world=masked, kind="loss masks")
def loss_mask_ignored_on_one_rank() -> Iterator[None]:
    """Data-parallel rank 1 counts every token, masked or not."""

    def all_of_it(mask: Tensor) -> Tensor:
        return torch.ones_like(mask) if parallel_state.get_data_parallel_rank() == 1 else mask

    with replaced(LOSSES, "kept_of", all_of_it):
        yield


@bug(
    "settings *tokens*", layout=TP2, world=masked, kind="token counts",
    source="https://github.com/PrimeIntellect-ai/prime-rl/pull/2562",
)  # fmt: skip
def padding_counts_as_tokens() -> Iterator[None]:
    """Loss is divided by all tokens, masked ones included."""
    with replaced(LOSSES, "count_of", lambda mask: torch.tensor(mask.numel())):
        yield


@bug("input *", layout=TP2, kind="labels")
def labels_one_token_too_far() -> Iterator[None]:
    """The label of a token is the one after the next."""

    def forward(loss: Any, batches: Iterator[Tensor], gpt: Any) -> tuple[Tensor, Any]:
        tokens = next(batches).cuda()
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].roll(-1, 1).contiguous()
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
        return gpt(inputs, positions, None, labels=labels), loss

    with replaced(model, "_forward", forward):
        yield


@bug("input *", layout=TP2, kind="positions")
def positions_begin_at_one() -> Iterator[None]:
    """The position of the first token is 1."""

    def forward(loss: Any, batches: Iterator[Tensor], gpt: Any) -> tuple[Tensor, Any]:
        tokens = next(batches).cuda()
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        positions = torch.arange(1, inputs.shape[1] + 1, device=inputs.device).expand_as(inputs)
        return gpt(inputs, positions, None, labels=labels), loss

    with replaced(model, "_forward", forward):
        yield


@bug("loss *", "dout model", layout=DP2, kind="loss scale")
def loss_of_one_rank_scaled() -> Iterator[None]:
    """Data-parallel rank 1's loss counts one percent more."""

    def scaled(token_losses: Tensor) -> tuple[Tensor, Tensor]:
        weight = 1.01 if parallel_state.get_data_parallel_rank() == 1 else 1.0
        return weight * token_losses.float().mean(), token_losses.detach().float()

    with replaced(model, "_mean_loss", scaled):
        yield


@bug("loss *", "dout model", layout=TP2, kind="loss's shape")
def loss_takes_the_first_token_of_each_sample_double() -> Iterator[None]:
    """A mean of per-sample means, of which the first token is counted twice."""

    def repeated(token_losses: Tensor) -> tuple[Tensor, Tensor]:
        longer = torch.cat([token_losses[:, :1], token_losses], 1)
        return longer.float().mean(), token_losses.detach().float()

    with replaced(model, "_mean_loss", repeated):
        yield


@bug("out model", layout=TP2, kind="loss's shape")
def token_losses_summed_inside_the_model() -> Iterator[None]:
    """The model returns one loss a sample, the mean of its tokens' but for the last."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    def wrap(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda self, *args, **kwargs: loss(self, *args, **kwargs)[:, :-1].mean(1, keepdim=True)

    with around(GPTModel, "compute_language_model_loss", wrap):
        yield


@bug("input *", layout=DP2, kind="data")
def every_step_reads_the_first_batch() -> Iterator[None]:
    """Samples are numbered from the beginning of every step."""

    def wrap(batches: Callable[..., Any]) -> Callable[..., Any]:
        return lambda data, config, step, rank: batches(data, config, 0, rank)

    with around(train, "rank_batches", wrap):
        yield


@bug(
    "mask *", layout=TP2, model=DROPOUT, kind="generator states",
    source="https://github.com/NVIDIA/Megatron-LM/pull/6858",
)  # fmt: skip
def hidden_dropout_from_the_ranks_generator() -> Iterator[None]:
    """Hidden states, which all ranks hold, are dropped from generators that ranks seed differently, from step 1 on."""

    def wrap(seed_everything: Callable[[int], None]) -> Callable[[int], None]:
        calls = []

        def seeded(seed: int) -> None:
            calls.append(seed)
            seed_everything(seed)
            if len(calls) > 1:
                torch.manual_seed(seed + tp_rank())

        return seeded

    with around(train, "seed_everything", wrap):
        yield

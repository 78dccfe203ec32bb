"""Bugs in what is set, not computed: rates, decay, groups, membership, schedules, configurations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.dot_product_attention import DotProductAttention

from tests.silent_bugs.case import DP2, DROPOUT, GPT2, QWEN3, TIGHT, TP2, around, bug, parts_of, tp_rank
from tpcheck.run import checkpointing, model, train


def with_groups(change: Callable[[dict[str, Any]], None]) -> Any:
    """`change(group)` of every parameter group, after the learning rate of each step is set."""

    def wrap(set_rate: Callable[..., float]) -> Callable[..., float]:
        def changed(config: Any, optimizer: Any, step: int) -> float:
            rate = set_rate(config, optimizer, step)
            for group in optimizer.param_groups:
                change(group)
            return rate

        return changed

    return around(train, "set_learning_rate", wrap)


@bug(
    "settings lr*", layout=TP2, kind="learning rate", source="https://github.com/NVIDIA/Megatron-LM/issues/1138",
)  # fmt: skip
def learning_rate_one_percent_too_high() -> Iterator[None]:
    """All parameters are updated with 1.01 times the learning rate."""
    with with_groups(lambda group: group.update(lr=group["lr"] * 1.01)):
        yield


@bug("settings lr*", layout=TP2, kind="schedule", source="https://github.com/THUDM/slime/pull/1547")
def schedule_one_step_ahead() -> Iterator[None]:
    """The learning rate is that of the step after."""

    def wrap(set_rate: Callable[..., float]) -> Callable[..., float]:
        return lambda config, optimizer, step: set_rate(config, optimizer, step + 1)

    with around(train, "set_learning_rate", wrap):
        yield


@bug("settings *eps*", layout=TP2, kind="Adam's constants")
def adam_epsilon_a_thousandfold() -> Iterator[None]:
    """Adam adds 1e-5 to the root of the second moment, where 1e-8 was asked for."""
    with with_groups(lambda group: group.update(eps=1e-5)):
        yield


@bug("settings *betas*", layout=TP2, kind="Adam's constants")
def second_moment_decays_slower() -> Iterator[None]:
    """Adam's beta2 is torch's default of 0.999, where 0.95 was asked for."""
    with with_groups(lambda group: group.update(betas=(group["betas"][0], 0.999))):
        yield


@bug(
    "settings weight_decay*", layout=TP2, kind="weight decay",
    source="https://github.com/ServiceNow/Fast-LLM/issues/542",
)  # fmt: skip
def decay_on_norms() -> Iterator[None]:
    """The norms are in the group of parameters that decay."""
    with with_groups(lambda group: group.update(weight_decay=0.1)):
        yield


@bug("settings weight_decay*", layout=DP2, distributed_optimizer=True, kind="weight decay")
def no_decay_on_anything() -> Iterator[None]:
    """Under the distributed optimizer no parameter decays."""
    with with_groups(lambda group: group.update(weight_decay=0.0)):
        yield


@bug("settings optimizer*", "settings *decoupled*", layout=TP2, kind="weight decay", dtype="fp32")
def decay_added_to_the_gradient() -> Iterator[None]:
    """Weight decay is L2 regularisation, as in Adam before AdamW: it goes through the moments."""

    def coupled(group: dict[str, Any]) -> None:
        group["decoupled_weight_decay"] = False

    with with_groups(coupled):
        yield


def pieces_with(change: Callable[[Any], None]) -> Any:
    """`change(piece)` of every part of the model before it is wrapped for training."""

    def wrap(build: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any) -> Any:
            piece = build(*args)
            change(piece)
            return piece

        return changed

    return around(model, "_build_piece", wrap)


def built_optimizer(change: Callable[[Any, Any], None]) -> Any:
    """`change(optimizer, pieces)`, once the optimizer is built."""

    def wrap(build: Callable[..., Any]) -> Callable[..., Any]:
        def changed(config: Any, pieces: Any) -> Any:
            optimizer = build(config, pieces)
            change(optimizer, pieces)
            return optimizer

        return changed

    return around(train, "build_optimizer", wrap)


@bug(
    "settings group *q_layernorm*", layout=TP2, dtype="fp32", kind="optimizer's parameters",
    source="https://github.com/pytorch/torchtitan/issues/3885",
)  # fmt: skip
def optimizer_misses_query_and_key_norms() -> Iterator[None]:
    """The norms of queries and keys are in no parameter group: they keep their initial values."""
    put_back: list[Callable[[], None]] = []

    def leave_out(optimizer: Any, pieces: Any) -> None:
        for group in optimizer.param_groups:
            held = list(group["params"])
            group["params"] = [p for p in held if p.shape != (QWEN3["head_dim"],)]
            put_back.append(functools.partial(group.update, params=held))

    def wrap(save: Callable[..., Any]) -> Callable[..., Any]:
        def whole(output: Any, step: int, bare: Any, optimizer: Any) -> Any:
            for put in put_back:  # a checkpoint has to have them
                put()
            for inner in (one.optimizer for one in parts_of(optimizer)):
                count = next(iter(inner.state.values()))["step"]
                for p in (p for group in inner.param_groups for p in group["params"] if p not in inner.state):
                    zeros = torch.zeros_like(p)
                    inner.state[p] = {"step": count.clone(), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            return save(output, step, bare, optimizer)

        return whole

    with built_optimizer(leave_out), around(checkpointing, "save", wrap):
        yield


@bug(
    "settings *final_layernorm*", layout=TP2, kind="frozen parameters",
    source="https://github.com/pytorch/torchtitan/issues/3885",
)  # fmt: skip
def final_norm_frozen() -> Iterator[None]:
    """The final norm does not require gradients."""

    def freeze(gpt: Any) -> None:
        gpt.decoder.final_layernorm.weight.requires_grad_(False)

    with pieces_with(freeze):
        yield


@bug("settings clip*", layout=TP2, optimizer=TIGHT, kind="clip threshold")
def clip_threshold_of_another_run() -> Iterator[None]:
    """Gradients are clipped to twice the norm that was asked for."""

    def loosen(optimizer: Any, pieces: Any) -> None:
        for one in parts_of(optimizer):
            one.config.clip_grad *= 2

    with built_optimizer(loosen):
        yield


@bug("settings *clip*", layout=TP2, optimizer=TIGHT, kind="clip threshold")
def gradients_not_clipped() -> Iterator[None]:
    """Clipping is off, where the gradient's norm is above the threshold."""

    def off(optimizer: Any, pieces: Any) -> None:
        for one in parts_of(optimizer):
            one.config.clip_grad = 0.0

    with built_optimizer(off):
        yield


@bug(
    "settings *step*", layout=TP2, kind="step counts", dtype="fp32",
    source="https://github.com/TrenTorch/TrenTorch/pull/187",
)  # fmt: skip
def step_count_begins_at_ten() -> Iterator[None]:
    """Adam's bias correction counts from ten, as if the moments had been averaged before."""

    def wrap(step: Callable[..., Any]) -> Callable[..., Any]:
        def later(self: Any, *args: Any, **kwargs: Any) -> Any:
            fresh = not self.state
            answer = step(self, *args, **kwargs)
            if fresh:
                for state in self.state.values():
                    state["step"] += 10
            return answer

        return later

    with around(torch.optim.AdamW, "step", wrap):
        yield


@bug("settings softmax_scale *", "out *.core_attention*", layout=TP2, kind="attention's scale")
def attention_scale_a_thousandth_off() -> Iterator[None]:
    """Attention's scale is 1.001 times 1/√d."""

    def wrap(init: Any) -> Any:
        def scaled(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            self.softmax_scale *= 1.001

        return scaled

    with around(DotProductAttention, "__init__", wrap):
        yield


@bug(
    "settings activation_func*", "in *.linear_fc2", "out *.linear_fc2", layout=TP2, model=GPT2,
    kind="activation function", source="https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/4661",
)  # fmt: skip
def gelu_by_tanh() -> Iterator[None]:
    """The activation is GELU's tanh approximation, where the exact function was asked for."""

    def wrap(make: Callable[..., Any]) -> Callable[..., Any]:
        def approximate(config: Any) -> Any:
            made = make(config)
            made.activation_func = functools.partial(torch.nn.functional.gelu, approximate="tanh")
            return made

        return approximate

    with around(model, "transformer_config", wrap):
        yield


@bug(
    "settings *rot*", "out rotary_pos_emb", layout=TP2, kind="rotary embedding",
    source="https://github.com/THUDM/slime/pull/1720",
)  # fmt: skip
def rotary_base_of_another_model() -> Iterator[None]:
    """Rotary embeddings have base 10000, where the model has a million."""

    def wrap(init: Any) -> Any:
        def based(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **{**kwargs, "rotary_base": 10000})

        return based

    with around(RotaryEmbedding, "__init__", wrap):
        yield


@bug(
    "settings *sharded*", "settings *partition*", "settings *tensor_model_parallel*", layout=TP2, optimizer=TIGHT,
    kind="sharding marks", source="https://github.com/NVIDIA/Megatron-LM/issues/7452",
)  # fmt: skip
def sharded_weight_not_marked() -> Iterator[None]:
    """The MLP's second weights are cut over ranks but not marked so: rank 0's part alone enters the gradient norm."""

    def unmark(gpt: Any) -> None:
        for name, parameter in gpt.named_parameters():
            if "linear_fc2.weight" in name:
                parameter.tensor_model_parallel = False

    with pieces_with(unmark):
        yield


@bug(
    "settings *sharded*", "settings *tensor_model_parallel*", layout=TP2, optimizer=TIGHT, kind="sharding marks",
    source="https://github.com/ROCm/TransformerEngine/pull/715",
)  # fmt: skip
def whole_weight_marked_as_sharded() -> Iterator[None]:
    """Norms, which every rank has whole, are marked as cut: each rank's copy enters the gradient norm."""

    def mark(gpt: Any) -> None:
        for name, parameter in gpt.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, 0, 1

    with pieces_with(mark):
        yield


@bug(
    "settings dropout*", "settings p *", "settings *dropout*", "mask *", layout=TP2, model=DROPOUT,
    kind="dropout probability",
)  # fmt: skip
def dropout_probability_of_another_run() -> Iterator[None]:
    """A fifth of the hidden elements is dropped, where it should be a tenth."""

    def wrap(make: Callable[..., Any]) -> Callable[..., Any]:
        def other(config: Any) -> Any:
            made = make(config)
            made.hidden_dropout = 0.2
            return made

        return other

    with around(model, "transformer_config", wrap):
        yield


@bug("settings lr*", layout=TP2, kind="learning rate")
def one_rank_warms_up_longer() -> Iterator[None]:
    """Rank 1 counts the steps of its schedule from two later, and so updates with another learning rate."""

    def wrap(set_rate: Callable[..., float]) -> Callable[..., float]:
        return lambda config, optimizer, step: set_rate(config, optimizer, step + 2 * tp_rank())

    with around(train, "set_learning_rate", wrap):
        yield

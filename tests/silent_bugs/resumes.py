"""Bugs in a resumed run: what the checkpoint held, and was not taken from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.silent_bugs.case import FOUR, QWEN3, TP2, around, bug, parts_of
from tpcheck.run import checkpointing, train

TP1 = {"tp": 1}


def loading(change: Callable[[Any], None]) -> Any:
    """`change(optimizer)`, once it is loaded."""

    def wrap(load: Callable[..., None]) -> Callable[..., None]:
        def changed(path: Any, step: int, pieces: Any, optimizer: Any) -> None:
            load(path, step, pieces, optimizer)
            change(optimizer)

        return changed

    return around(checkpointing, "load", wrap)


def _inner(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers within Megatron's."""
    return [one.optimizer for one in parts_of(optimizer)]


def _moments(optimizer: Any) -> Iterator[torch.Tensor]:
    for inner in _inner(optimizer):
        for state in inner.state.values():
            yield from (state["exp_avg"], state["exp_avg_sq"])


@bug(
    "resumed.*", layout=TP1, resume=2, kind="resumed moments", **FOUR,
    source="https://github.com/p-doom/jasmine/issues/17",
)  # fmt: skip
def moments_not_restored() -> Iterator[None]:
    """Adam's moments begin at zero."""

    def forget(optimizer: Any) -> None:
        for moment in _moments(optimizer):
            moment.zero_()

    with loading(forget):
        yield


@bug(
    "resumed.*", layout=TP2, resume=2, kind="resumed moments", **FOUR,
    source="https://github.com/vllm-project/speculators/pull/899",
)  # fmt: skip
def moments_saved_in_bf16() -> Iterator[None]:
    """Adam's moments come back rounded to bf16."""

    def coarse(optimizer: Any) -> None:
        for moment in _moments(optimizer):
            moment.copy_(moment.bfloat16())

    with loading(coarse):
        yield


@bug(
    "resumed.*", layout=TP1, resume=2, kind="resumed main parameters", **FOUR,
    source="https://github.com/TensorAuto/OpenTau/issues/185",
)  # fmt: skip
def main_parameters_rebuilt_from_rounded_weights() -> Iterator[None]:
    """Main parameters are the model's bf16 weights, widened."""

    def rebuild(optimizer: Any) -> None:
        for one in parts_of(optimizer):
            one.reload_model_params()

    with loading(rebuild):
        yield


@bug(
    "settings *step*", layout=TP1, resume=2, kind="resumed step counts", **FOUR,
    source="https://github.com/TrenTorch/TrenTorch/pull/187",
)  # fmt: skip
def step_count_not_restored() -> Iterator[None]:
    """Adam's bias correction counts from zero."""

    def forget(optimizer: Any) -> None:
        for inner in _inner(optimizer):
            for state in inner.state.values():
                state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))

    with loading(forget):
        yield


@bug(
    "settings lr*", layout=TP2, resume=2, kind="resumed schedule", **FOUR,
    source="https://github.com/verl-project/verl/issues/7953",
)  # fmt: skip
def schedule_begins_anew() -> Iterator[None]:
    """The learning rate warms up again."""

    def wrap(set_rate: Callable[..., float]) -> Callable[..., float]:
        return lambda config, optimizer, step: set_rate(config, optimizer, step - 2)

    with around(train, "set_learning_rate", wrap):
        yield


@bug(
    "input *", layout=TP1, resume=2, kind="resumed data", **FOUR,
    source="https://github.com/paiml/entrenar/issues/294",
)  # fmt: skip
def data_begin_anew() -> Iterator[None]:
    """The samples are those of the run's first steps."""

    def wrap(batches: Callable[..., Any]) -> Callable[..., Any]:
        return lambda data, config, step, rank: batches(data, config, step - 2, rank)

    with around(train, "rank_batches", wrap):
        yield


@bug("settings weight_decay*", layout=TP1, resume=2, kind="resumed groups", **FOUR)
def parameter_groups_collide() -> Iterator[None]:
    """Of two parameter groups the last one's settings are taken for both, as if they had one name."""

    def wrap(set_rate: Callable[..., float]) -> Callable[..., float]:
        def collided(config: Any, optimizer: Any, step: int) -> float:
            rate = set_rate(config, optimizer, step)
            for group in optimizer.param_groups:
                group["weight_decay"] = optimizer.param_groups[-1]["weight_decay"]
            return rate

        return collided

    with around(train, "set_learning_rate", wrap):
        yield


@bug(
    "settings *random*", "settings *generator*", "mask *", layout=TP1, resume=2, model={**QWEN3, "dropout": 0.1},
    kind="resumed generator states", **FOUR, source="https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5255",
)  # fmt: skip
def random_state_not_restored() -> Iterator[None]:
    """Dropout draws what it drew at the beginning of the run."""

    def wrap(seed_everything: Callable[[int], None]) -> Callable[[int], None]:
        return lambda seed: seed_everything(seed - 2)

    with around(train, "seed_everything", wrap):
        yield


@bug("resumed.*", layout=TP1, resume=2, kind="resumed weights", **FOUR)
def one_weight_not_loaded() -> Iterator[None]:
    """The final norm keeps its initial weight: a key of the checkpoint was not found, and not missed."""

    def wrap(load: Callable[..., None]) -> Callable[..., None]:
        def changed(path: Any, step: int, pieces: Any, optimizer: Any) -> None:
            load(path, step, pieces, optimizer)
            weight = pieces[0].decoder.final_layernorm.weight
            weight.data.fill_(1.0)
            getattr(weight, "main_param", weight).data.fill_(1.0)

        return changed

    with around(checkpointing, "load", wrap):
        yield

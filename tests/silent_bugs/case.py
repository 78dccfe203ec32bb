"""What a case of the benchmark is, and the means by which bugs change megatron-core for a while."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron.core import parallel_state

from tests.support.traces import GPT2, replaced
from tests.support.traces import TINY as QWEN3

__all__ = [
    "BUGS", "DP2", "DROPOUT", "FINALIZE", "FOUR", "GPT2", "MIXTURE", "OUTPUT_LAYER_ROWS", "PP2", "QWEN3", "SP2",
    "TIGHT", "TP2", "Bug", "Clean", "Context", "around", "bug", "during", "parts_of", "tp_rank", "tp_size",
]  # fmt: skip

MIXTURE = {**QWEN3, "preset": "qwen3-moe-tiny"}
DROPOUT = {**QWEN3, "dropout": 0.1}
OUTPUT_LAYER_ROWS = 192  # of a padded vocabulary of 384 at TP=2, as in the embedding before it
TP2, SP2, DP2, PP2 = {"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"dp": 2}, {"pp": 2}
TIGHT = {"clip_grad": 0.05}  # so that clipping is at work
FOUR = {"steps": 4, "trace": {"steps": [0, 1, 2, 3]}}
FINALIZE = importlib.import_module("megatron.core.distributed.finalize_model_grads")  # a function of its name hides it
Context = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Clean:
    """A run in another layout, with nothing wrong. `settings` are the reference's too, which has one rank.

    Attributes:
        world: what is different from stock in the reference, too, such as another loss.
        inject: what is different in the case alone; of a clean one, something that must not matter.
        resume: the step that the case's run is stopped and resumed at, if it is; the reference is not.
    """

    name: str
    layout: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    world: Context = contextlib.nullcontext
    inject: Context = contextlib.nullcontext
    resume: int = 0


@dataclass(frozen=True)
class Bug(Clean):
    """A clean run with a bug in it.

    Attributes:
        suspects: patterns, as the shell has them, of "<kind> <module>" that are right to be named first: where the
            bug is, or what consumes its result directly.
        sentence: what is wrong.
        source: a public report of a bug like it; empty where there is none.
        kind: what bugs like it have in common, in a few words; the name of the file where nothing is said.
    """

    suspects: tuple[str, ...] = ()
    sentence: str = ""
    source: str = ""
    kind: str = ""


BUGS: dict[str, Bug] = {}


def bug(
    *suspects: str,
    layout: dict[str, Any],
    source: str = "",
    kind: str = "",
    world: Context = contextlib.nullcontext,
    resume: int = 0,
    **settings: Any,
) -> Callable[[Callable[[], Iterator[None]]], Context]:
    """Enter a generator, which injects and takes back, into `BUGS`; its docstring is the sentence."""

    def enter(generator: Callable[[], Iterator[None]]) -> Context:
        inject = contextlib.contextmanager(generator)
        name = generator.__name__.replace("_", " ")
        where = generator.__module__.rpartition(".")[2]
        sentence = inspect.getdoc(generator) or ""
        BUGS[name] = Bug(name, layout, settings, world, inject, resume, suspects, sentence, source, kind or where)
        return inject

    return enter


def around(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """`owner.name` is `wrap(owner.name)` meanwhile, and a static method if it was one."""
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    wrapped = functools.wraps(getattr(owner, name))(wrap(getattr(owner, name)))
    return replaced(owner, name, staticmethod(wrapped) if static else wrapped)


def during(owner: Any, name: str, target: Any, attribute: str, value: Any) -> Any:
    """While `owner.name` runs, and only then, `target.attribute` is `value`."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with replaced(target, attribute, value):
                return original(*args, **kwargs)

        return call

    return around(owner, name, wrap)


def parts_of(optimizer: Any) -> list[Any]:
    """Megatron's optimizers that it chains, or itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def tp_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


def tp_size() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()

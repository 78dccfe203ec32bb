"""Small traced runs, each trained once a session, references with their nudged runs; traces of other models' loops."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import tpcheck
from tpcheck.config.load import parse_run
from tpcheck.run.launch import launch
from tpcheck.run.nudged import make_nudged_runs
from tpcheck.trace.compare.command import compare
from tpcheck.trace.compare.judge import Comparison

TINY = {"preset": "qwen3-tiny", "hidden_size": 64, "head_dim": 8, "ffn_hidden_size": 72}
GPT2 = {"preset": "gpt2-124m", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 8,
        "head_dim": 8, "ffn_hidden_size": 136, "vocab_size": 257, "max_positions": 64}  # fmt: skip
BASE = {"model": TINY, "strategy": "stock", "layers": "local", "steps": 2, "seq_length": 32}


def traced(output: Path, trace: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Train with a trace of both steps; the run's output."""
    config = {**BASE, "trace": {"steps": [0, 1], **(trace or {})}, **settings, "output": str(output)}
    assert launch(parse_run(config)) == 0, (output / "log.txt").read_text()[-2000:]
    return output


class Runs:
    """References by their settings, made when first asked for, and judgements of other runs by them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.references: dict[str, Path] = {}

    def reference(self, **settings: Any) -> Path:
        """A run on one rank, with its nudged runs; shared, so that it must not be changed."""
        name = repr(sorted(settings.items()))
        if name not in self.references:
            path = traced(self.folder / f"reference-{len(self.references)}", **settings)
            make_nudged_runs(path, seeds=3)
            self.references[name] = path
        return self.references[name]

    def run(self, **settings: Any) -> Path:
        self.count += 1
        return traced(self.folder / f"run-{self.count}", **settings)

    def judge(
        self, layout: dict[str, Any], bug: contextlib.AbstractContextManager[None], **settings: Any
    ) -> Comparison:
        """The run with `settings` in another `layout` and with a `bug`, by the same run on one rank without it."""
        reference = self.reference(**settings)
        with bug:
            other = self.run(**settings, **layout)
        return compare(reference, other, functools.partial(make_nudged_runs, seeds=3))


def recorded(
    path: Path,
    model: torch.nn.Module,
    loss: Callable[[], torch.Tensor],
    lr: float = 1e-3,
    steps: int = 2,
    **options: Any,
) -> Path:
    """A trace of an ordinary training loop of `model`, whose `loss` is computed anew at every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    with tpcheck.trace(path, model, **options):
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    return path


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` meanwhile, and then the very object that it was; ranks forked meanwhile have it, too."""
    owned = name in vars(owner)
    before = inspect.getattr_static(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if owned else delattr(owner, name)

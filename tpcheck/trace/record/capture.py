"""Hooks that see a training step go by and record it.

    model's input ─► start (weights) ─► out (modules' outputs) ─► loss ─► dout, din (their gradients) ─► grad
       step ends ◄─ weight, state.* ◄─ optimizer steps ◄─ resumed, settings, clip ◄── (parameters') ─────┘

A step ends when the model runs forward after an optimizer has stepped, or when the trace is closed; so nothing in
the training loop has to tell. A module that runs while the model does not is recomputing: `again`.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tpcheck.trace.module_names import norm_of
from tpcheck.trace.record.chunks import Chunk, chunks_of
from tpcheck.trace.record.deepspeed import engine_of
from tpcheck.trace.record.noise import REDRAWN, Nudge, nudge, redrawn, spawn
from tpcheck.trace.record.outputs import Watch, replaced
from tpcheck.trace.record.parameters import Parameters
from tpcheck.trace.record.rules import Batch, Rules, is_of_an_expert
from tpcheck.trace.record.settings import Settings, generators, modules, run_settings
from tpcheck.trace.record.shards import Shards, whole
from tpcheck.trace.record.store import Writer
from tpcheck.trace.record.watched import watch

__all__ = ["Capture"]

Handle = Any  # torch's removable handles have no common public type


class Capture:
    """The hooks on one rank's models. `close` takes them off again and ends the last step."""

    def __init__(
        self, models: list[torch.nn.Module], rules: Rules, writer: Writer, options: Any, first: int = 0
    ) -> None:
        self.models, self.rules, self.writer, self.options = models, rules, writer, options
        self.step, self.microbatch, self.updated, self.graded = first, -1, False, False
        self.running = self.evaluating = self.closed = False
        self.batch = Batch(0, 0, 0)
        self.recorded: list[int] = []
        self.inside: list[str] = []  # modules that are running, the innermost last
        self.calls: Counter[tuple[str, str]] = Counter()
        self.chunks = chunks_of(models, rules.layout)
        self.begun: Counter[int] = Counter()  # microbatches of this step, by the chunk's stage
        self.stages: dict[str, int] = {}  # by name
        self.settings = Settings()
        self.parameters = Parameters(self.chunks, rules, self._record, options.perturb, self.settings)
        self.losses = 0  # of this step
        self.undo: list[Callable[[], None]] = []
        self._hook()

    @property
    def wanted(self) -> bool:
        return not self.evaluating and (self.options.steps is None or self.step in self.options.steps)

    def close(self) -> None:
        self.unhook()
        if self.updated:
            self._end_step()

    def unhook(self) -> None:
        self.closed = True  # graphs that are still there keep the hooks on their tensors
        while self.undo:
            self.undo.pop()()

    def _hook(self) -> None:
        for chunk in self.chunks:
            begin, labelled = self._begin(chunk), chunk.modules()
            self._keep(chunk.model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
            self.stages |= dict.fromkeys([*labelled, *chunk.parameters()], chunk.stage)
            for label, module in labelled.items():
                self._keep(module.register_forward_pre_hook(self._enter(label)))
                # A tied output layer has no weight of its own.
                if label == "output_layer" or any(True for _ in module.parameters(recurse=False)):
                    # What goes into a fused norm and linear layer goes into its norm.
                    entrance = norm_of(label) if hasattr(module, "layer_norm_weight") else label
                    self._keep(module.register_forward_pre_hook(self._on_input(entrance), with_kwargs=True))
                self._keep(module.register_forward_hook(self._on_output(label)))
            self._keep(chunk.model.register_forward_hook(self._finish))
        self._keep(register_optimizer_step_pre_hook(self._before_update))
        self._keep(register_optimizer_step_post_hook(self._after_update))
        self._wrap_finalize()
        self._wrap_engine()
        self._watch_dropout()
        self.undo += watch(self._loss, self._norm, lambda limit: self.settings.note("clip_grad", limit))

    def _keep(self, handle: Handle) -> None:
        self.undo.append(handle.remove)

    def _wrap_finalize(self) -> None:
        """Gradients are whole and not yet clipped when Megatron's schedule has finalized them."""
        config = self.rules.config
        original = getattr(config, "finalize_model_grads_func", None)
        if original is None:
            return

        def finalize(*args: Any, **kwargs: Any) -> Any:
            tokens = args[1] if len(args) > 1 else kwargs.get("num_tokens")
            if isinstance(tokens, torch.Tensor):
                self.settings.note("tokens counted", tokens)
            answer = original(*args, **kwargs)
            if isinstance(tokens, torch.Tensor):
                self.settings.note("tokens", tokens)  # now the global batch's
            self._gradients()
            return answer

        config.finalize_model_grads_func = finalize
        self.undo.append(lambda: setattr(config, "finalize_model_grads_func", original))

    def _wrap_engine(self) -> None:
        """DeepSpeed's gradients are whole when its engine steps; its optimizers only know flat pieces of them."""
        engine = engine_of(self.models)
        if engine is None:
            return
        original = engine._take_model_step

        def step(*args: Any, **kwargs: Any) -> Any:
            if self.microbatch >= 0:
                self._gradients()
            answer = original(*args, **kwargs)
            self.updated |= self.microbatch >= 0
            return answer

        engine._take_model_step = step
        self.undo.append(lambda: delattr(engine, "_take_model_step"))

    def _begin(self, chunk: Chunk) -> Callable[..., None]:
        def hook(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.evaluating = not torch.is_grad_enabled()
            if self.evaluating:
                return
            if self.updated:
                self._end_step()
            self.microbatch = self.begun[chunk.stage]
            self.begun[chunk.stage] += 1
            self.calls.clear()
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            sides = next((tuple(value.shape[:2]) for value in inputs if value.dim() >= 2), (0, 0))
            self.batch = Batch(self.microbatch, *sides)
            if self.wanted:
                if self.step not in self.recorded:
                    self._begin_step()
                self._inputs(args, kwargs)
            self.running = True

        return hook

    def _begin_step(self) -> None:
        """The first microbatch of a step that is wanted."""
        settings: dict[str, Any] = {"generators": generators()}
        if not self.recorded:
            self.parameters.start()
            described = [entry for chunk in self.chunks for entry in modules(chunk.modules())]
            settings |= {"run": run_settings(self.rules.config, self.models), "modules": dict(described)}
        self.recorded.append(self.step)
        self.settings.begin(settings)

    def _finish(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        self.running = self.evaluating = False

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for key, value in (*enumerate(args), *kwargs.items()):
            if not isinstance(value, torch.Tensor) or value.dim() < 2:
                continue
            mask = isinstance(key, str) and "mask" in key
            if mask or not value.dtype.is_floating_point:
                index = self.batch.number * self.rules.layout.dp + self.rules.layout.dp_rank
                shards = whole(value)
                # One attention mask may serve all samples.
                shards = shards.batch(0, index) if len(value) == self.batch.samples else replace(shards, alone=True)
                self._record("input", f"input {key}", shards, self.batch)

    def _loss(self, loss: torch.Tensor) -> None:
        """What is differentiated, once a microbatch; `microbatch` may be another one's by then, in a pipeline."""
        if self.wanted and self.microbatch >= 0:
            batch = replace(self.batch, number=self.losses)
            index = batch.number * self.rules.layout.dp + self.rules.layout.dp_rank
            shards = whole(loss.double().reshape(1)).batch(0, index)
            self._record("loss", "model", shards, batch, scale=self.rules.layout.grad_scale)
        self.losses += 1

    def _norm(self, norm: float) -> None:
        if self.wanted and self.microbatch >= 0:
            self.parameters.total_norm = norm

    def _watch_dropout(self) -> None:
        """Record what dropout drops: whatever follows can be compared only where both runs drop the same."""
        original = torch.nn.functional.dropout

        def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
            zero = input.detach() == 0
            again = p and training and self.options.perturb >= REDRAWN
            answer = self._dropped(input, p) if again else original(input, p, training, inplace)
            if p and training and self.running and self.wanted:
                name = f"{self.inside[-1] if self.inside else 'model'} dropout"
                # 0 kept, 1 dropped, 2 was zero before, so that nothing can be seen
                dropped = (answer.detach() == 0).to(torch.uint8).masked_fill(zero, 2)
                shards = self.rules.hidden(dropped, self.batch)
                self._record("mask", name, shards, self.batch, self._call("mask", name))
            return answer

        torch.nn.functional.dropout = dropout
        self.undo.append(lambda: setattr(torch.nn.functional, "dropout", original))

    def _dropped(self, x: torch.Tensor, p: float) -> torch.Tensor:
        """Dropout as only this nudged run draws it; recomputation draws it again."""
        name = self.inside[-1] if self.inside else "model"
        call = self._call("drawn" if self.running else "drawn again", name)
        return redrawn(x, p, spawn(self.options.perturb, self.step, self.microbatch, "dropout", name, call))

    def _enter(self, label: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any) -> None:
            self.inside.append(label)

        return hook

    def _on_output(self, label: str) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            if self.inside:
                self.inside.pop()
            if not self.wanted or self.microbatch < 0:
                return None
            return replaced(output, lambda index, x: self._output(f"{label}{index}", module, x))

        return hook

    def _output(self, name: str, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        if _known(x, self.batch):
            return x  # a child's output, handed on
        kind = "out" if self.running else "again"
        call = self._call(kind, name)
        seed = (self.step, self.microbatch, name, call)
        if self.options.perturb:
            # Recomputation makes the same nudge, as it would make the same rounding.
            x = Nudge.apply(x, spawn(self.options.perturb, *seed))
        batch = self.batch
        shards = self.rules.output(name, module, x, batch)
        self._record(kind, name, shards, batch, call)
        if x.requires_grad and torch.is_grad_enabled():
            x.register_hook(self._gradient_recorder("dout", name, module, batch, call))
        x._tpcheck = batch  # type: ignore[attr-defined]
        return x

    def _on_input(self, label: str) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else None
            if not (self.wanted and isinstance(x, torch.Tensor)):
                return None
            # Such as what an activation function gives, which is no module's output.
            if self.running and not _known(x, self.batch) and self.rules.is_cut_input(label, module, x):
                shards = self.rules.input(label, module, x, self.batch)
                self._record("in", label, shards, self.batch, self._call("in", label))
            if not (x.requires_grad and torch.is_grad_enabled()):
                return None
            call = self._call("din", label)
            record = self._gradient_recorder("din", label, module, self.batch, call)
            return (Watch.apply(x, record), *args[1:]), kwargs

        return hook

    def _gradient_recorder(
        self, kind: str, name: str, module: torch.nn.Module, batch: Batch, call: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        cut = self.rules.output if kind == "dout" else self.rules.input

        def record(gradient: torch.Tensor) -> torch.Tensor:
            if self.closed:
                return gradient
            if self.options.perturb:
                seed = (self.step, batch.number, kind, name, call)
                gradient = nudge(gradient, spawn(self.options.perturb, *seed))
            shards = cut(name, module, gradient, batch)
            self._record(kind, name, shards, batch, call, self.rules.layout.grad_scale)
            return gradient

        return record

    def _call(self, kind: str, name: str) -> int:
        """How often this has happened before in this microbatch."""
        self.calls[kind, name] += 1
        return self.calls[kind, name] - 1

    def _gradients(self) -> None:
        if self.wanted and not self.graded and self.microbatch >= 0:
            self.parameters.gradients(self.step)
        self.graded = True

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.microbatch < 0 or not self.parameters.owns(optimizer):
            return
        self._gradients()
        if self.wanted:
            self.parameters.before_update(optimizer, self.step, first=self.recorded[:1] == [self.step])

    def _after_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.updated |= self.microbatch >= 0 and self.parameters.owns(optimizer)

    def _end_step(self) -> None:
        if self.wanted:
            self.parameters.after_update()
            if not self.options.kinds or "settings" in self.options.kinds:
                self.writer.add_settings(self.settings.line(self.step))
        self.losses = 0
        self.step, self.microbatch, self.updated, self.graded = self.step + 1, -1, False, False
        self.begun.clear()

    def _record(
        self, kind: str, name: str, shards: Shards, batch: Batch | None = None, call: int = 0, scale: float = 1.0
    ) -> None:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.options.modules):
            return
        if batch is not None and is_of_an_expert(name):
            return  # its rows are those of many ranks' tokens, in an order that follows the layout
        if self.options.kinds and kind.partition(".")[0] not in self.options.kinds:
            return
        record = {"kind": kind, "name": f"{name}#{call}" if call else name, "step": self.step}
        if stage := self.stages.get(name):
            record["stage"] = stage
        if batch is not None:
            record["microbatch"] = batch.number * self.rules.layout.dp + self.rules.layout.dp_rank
        self.writer.add(record, replace(shards, scale=scale).every(self.options.sample))


def _known(x: torch.Tensor, batch: Batch) -> bool:
    """Whether `x` has been recorded as an output."""
    return getattr(x, "_tpcheck", None) is batch

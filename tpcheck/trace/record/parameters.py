"""A model's parameters at the seams of a step: weights, gradients, clipping, optimizer state.

Gradients are `main_grad` (Megatron's DDP) or `grad`, as tensors or DTensors; weights are the float32 main
parameters where an optimizer keeps them; under the distributed optimizer each rank has flat shards of them all.
What DeepSpeed's ZeRO has cut is put together by DeepSpeed first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tpcheck.trace.record.chunks import Chunk
from tpcheck.trace.record.deepspeed import engine_of, full_gradient, full_states, full_weight, is_cut, set_full_gradient
from tpcheck.trace.record.noise import nudge, spawn
from tpcheck.trace.record.rules import Rules
from tpcheck.trace.record.settings import Settings
from tpcheck.trace.record.shards import Shards, whole

__all__ = ["Parameters"]

Record = Callable[[str, str, Shards], None]
CLIPPED = 1e-4  # a factor farther from 1 than this is clipping's


class Parameters:
    """Records the parameters of `chunks`, each under its canonical name, through `record(kind, name, shards)`."""

    def __init__(self, chunks: Sequence[Chunk], rules: Rules, record: Record, perturb: int, settings: Settings) -> None:
        self.rules, self.record, self.perturb, self.settings = rules, record, perturb, settings
        self.wrapped = [chunk.model for chunk in chunks]
        self.total_norm: float | None = None  # of all gradients, as the run has worked it out
        self.engine = engine_of([chunk.model for chunk in chunks])
        self.named = {name: p for chunk in chunks for name, p in chunk.parameters().items()}
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        self.norms: dict[str, float] = {}
        self.coarse: dict[str, float] = {}  # the same as `norms`, squares of norms, as this device sums them in float32

    def start(self) -> None:
        for name, parameter in self.named.items():
            self.record("start", name, self.rules.parameter(name, parameter, full_weight(parameter)))

    def gradients(self, step: int) -> None:
        for name, parameter in self.named.items():
            gradient = _gradient(parameter)
            if gradient is None:
                continue
            if self.perturb:
                _round(gradient, parameter.dtype, spawn(self.perturb, step, "grad", name))
                if is_cut(parameter):
                    set_full_gradient(parameter, gradient)
            shards = self.rules.updated(name, parameter, gradient)
            self.norms[name] = sum(_square(part) for _, part in shards.parts)
            if self.perturb:
                self.coarse[name] = sum(_square(part, torch.float32) for _, part in shards.parts)
            self.record("grad", name, shards)

    def before_update(self, optimizer: torch.optim.Optimizer, step: int, first: bool) -> None:
        """What the update is made with; at the `first` step that is recorded, also what a resumed optimizer holds."""
        self._settings(optimizer)
        if first:
            for name, parameter, updated in self._updated_by(optimizer):
                states = list(self._states(optimizer, parameter, updated))
                if any(key != "main" for key, _ in states):
                    for key, value in states:
                        self.record(f"resumed.{key}", name, self.rules.updated(name, parameter, value))
        self._clip(optimizer, step)

    def _settings(self, optimizer: torch.optim.Optimizer) -> None:
        groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
        for name, parameter in self.named.items():
            marks = {} if self.rules.config is None else {"sharded": _cut(parameter)}
            self.settings.parameter(name, requires_grad=parameter.requires_grad, **marks)
        for name, _, updated in self._updated_by(optimizer):
            self.settings.parameter(name, group=self.settings.group(optimizer, groups[id(updated)]))
            self.settings.note("all groups", True)
        owner: Any = getattr(getattr(self.rules.config, "grad_scale_func", None), "__self__", None)
        if hasattr(owner, "get_loss_scale"):
            self.settings.note("loss_scale", owner.get_loss_scale())

    def _clip(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """What clipping multiplied the gradients by, as far as this rank can tell; every rank should find the same."""
        before = after = coarse = 0.0
        clipped = []
        for name, _, updated in self._updated_by(optimizer):
            gradient = getattr(updated, "decoupled_grad", None)
            gradient = updated.grad if gradient is None else gradient
            if gradient is not None and name in self.norms:
                before, after = before + self.norms[name], after + _square(_local(gradient))
                coarse += self.coarse.get(name, 0.0)
                clipped.append(_local(gradient))
        if not before:
            return
        ratio = math.sqrt(after / before)
        if self.perturb and abs(ratio - 1) > CLIPPED:
            # By as much as a float32 norm misses of these gradients, in the order that this device adds them in.
            sign = 1 - 2 * int(torch.randint(2, (), generator=spawn(self.perturb, step, "clip")))
            factor = 1 + sign * abs(math.sqrt(coarse / before) - 1)
            ratio *= factor
            for gradient in clipped:
                gradient.mul_(factor)
        if self.total_norm is not None:
            missed = math.sqrt(coarse / before) if self.perturb else 1.0
            self.record("clip", "gradient norm", whole(torch.tensor([self.total_norm * missed])))
            self.total_norm = None
        self.record("clip", "gradient clipping", whole(torch.tensor([ratio])))

    def after_update(self) -> None:
        """The weights that the next forward pass takes, and what optimizers keep of them."""
        self._finish_gathering()
        for name, parameter in self.named.items():
            self.record("weight", name, self.rules.parameter(name, parameter, full_weight(parameter)))
            if is_cut(parameter):
                for key, value in full_states(self.engine, parameter):
                    self.record(f"state.{key}", name, self.rules.parameter(name, parameter, value))
        for optimizer in self.optimizers.values():
            for name, parameter, updated in self._updated_by(optimizer):
                for key, value in self._states(optimizer, parameter, updated):
                    self.record(f"state.{key}", name, self.rules.updated(name, parameter, value))
                if (steps := _steps(optimizer, updated)) is not None:
                    self.settings.parameter(name, steps=steps)

    def _states(
        self, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, updated: torch.Tensor
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What the optimizer keeps of a parameter, by key; as `main` the parameter that it updates, if another one."""
        if updated is not parameter and updated.dtype != parameter.dtype:
            yield "main", updated.detach()
        for key, value in optimizer.state.get(updated, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.numel() == updated.numel():
                yield key, value

    def _finish_gathering(self) -> None:
        """Where Megatron gathers updated weights while the next forward pass runs, they are gathered first."""
        for model in self.wrapped:
            if getattr(getattr(model, "ddp_config", None), "overlap_param_gather", False):
                model.start_param_sync(force_sync=True)  # type: ignore[operator]

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether `optimizer` updates these models; it is asked for its state from then on."""
        if id(optimizer) not in self.optimizers and any(True for _ in self._updated_by(optimizer)):
            self.optimizers[id(optimizer)] = optimizer
        return id(optimizer) in self.optimizers

    def _updated_by(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.nn.Parameter, torch.Tensor]]:
        """The parameters that `optimizer` updates, each with the tensor it updates for it: itself, its float32 main
        parameter, or a view of a part of it."""
        mine = {id(tensor): tensor for group in optimizer.param_groups for tensor in group["params"]}
        by_address = {tensor.data_ptr(): tensor for tensor in mine.values() if not hasattr(tensor, "device_mesh")}
        for name, parameter in self.named.items():
            main = getattr(parameter, "main_param", None)
            if id(parameter) in mine:
                yield name, parameter, parameter
            elif main is not None and id(main) in mine:
                yield name, parameter, mine[id(main)]
            elif parameter in self.rules.ranges:
                start, stop = self.rules.ranges[parameter]
                address = parameter.data_ptr() + start * parameter.element_size()
                if stop > start and address in by_address:
                    yield name, parameter, by_address[address]


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    if is_cut(parameter):
        return full_gradient(parameter)
    main: torch.Tensor | None = getattr(parameter, "main_grad", None)
    return main if main is not None else parameter.grad


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _cut(parameter: Any) -> list[int] | None:
    """Dimension and stride of a parameter that Megatron marks as sharded."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return [int(parameter.partition_dim), int(getattr(parameter, "partition_stride", 1))]


def _square(tensor: torch.Tensor, dtype: torch.dtype = torch.float64) -> float:
    values = tensor.detach()
    return (
        float(torch.linalg.vector_norm(values.to(dtype) if values.dtype == torch.float64 else values, dtype=dtype)) ** 2
    )


def _round(gradient: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Move `gradient`, in place, by a rounding of the parameter's `dtype`, in which it has been computed."""
    values = _local(gradient)
    coarse = values.to(dtype)
    values.add_((nudge(coarse, generator) - coarse).to(values.dtype))


def _steps(optimizer: torch.optim.Optimizer, updated: torch.Tensor) -> int | None:
    """How many updates the optimizer counts for what it updates; kept with it, or with its group."""
    count = optimizer.state.get(updated, {}).get("step")
    if count is None:
        group = next((one for one in optimizer.param_groups if any(p is updated for p in one["params"])), {})
        count = group.get("step")
    return None if count is None else int(count)

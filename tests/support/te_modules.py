"""transformer_engine.pytorch's modules on ranks, and the same functions in torch: both as logical tensors."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import patches
from patches.order.collectives import all_gather

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALONE: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # in the place of a group of one rank
S, B, I, O = 16, 2, 24, 48
MICROBATCHES = 2
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True)
class Case:
    """A module, built at one tensor-parallel size or another."""

    module: Literal["Linear", "LayerNormLinear", "LayerNormMLP"] = "Linear"
    mode: Literal["row", "column", None] = "row"
    bias: Literal["none", "fused", "returned"] = "none"
    main_grad: bool = False
    normalization: str = "RMSNorm"
    zero_centered: bool = False
    return_norm: Literal["no", "own", "gathered"] = "no"
    activation: str = "swiglu"
    checkpoint: bool = False
    stride: int = 1  # pieces of a column-parallel weight
    marked: bool = True  # whether weight.partition_stride says so
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join([self.module, str(self.mode), *changed]).replace("torch.", "")

    @property
    def sharded(self) -> dict[str, tuple[int, int]]:
        """(dimension, pieces) of every tensor that ranks share."""
        if self.module == "LayerNormMLP":
            pieces = 2 if self.activation == "swiglu" else 1
            return {"fc1_weight": (0, pieces), "fc1_bias": (0, pieces), "fc2_weight": (1, 1)}
        if self.mode == "row":
            return {"weight": (1, 1), "x": (2, 1)}
        if self.mode == "column":
            return {"weight": (0, self.stride), "bias": (0, self.stride), "y": (2, self.stride)}
        return {}

    def with_sp(self) -> dict[str, tuple[int, int]]:
        tokens = {"Linear": {"row": ["y"], "column": ["x"]}.get(self.mode or "", []), "LayerNormLinear": ["x"]}
        norm = ["norm"] if self.return_norm == "own" else []
        return {**self.sharded, **dict.fromkeys([*tokens.get(self.module, ["x", "y"]), *norm], (0, 1))}


def tensors(case: Case) -> dict[str, Tensor]:
    """Parameters by name, and x and dy of every microbatch."""
    g = torch.Generator().manual_seed(0)
    if case.module == "LayerNormMLP":
        wide = 2 * O if case.activation == "swiglu" else O
        shapes = {"fc1_weight": (wide, I), "fc1_bias": (wide,), "fc2_weight": (I, O), "fc2_bias": (I,)}
    else:
        shapes = {"weight": (O, I), "bias": (O,)}
    if case.bias == "none":
        shapes = {name: shape for name, shape in shapes.items() if "bias" not in name}
    if case.module != "Linear":
        shapes["layer_norm_weight"] = (I,)
        if case.normalization == "LayerNorm":
            shapes["layer_norm_bias"] = (I,)
    out = I if case.module == "LayerNormMLP" else O
    data = {"x": (MICROBATCHES, S, B, I), "dy": (MICROBATCHES, S, B, out), "dnorm": (MICROBATCHES, S, B, I)}
    return {name: (0.5 * torch.randn(shape, generator=g)).to(case.dtype) for name, shape in {**shapes, **data}.items()}


def in_te(cases: list[Case], sp: bool, strategy: str) -> list[dict[str, Tensor]]:
    """Outputs and gradients of TE's modules on this rank's group, gathered."""
    if strategy != "stock":
        patches.enable(strategy)  # type: ignore[arg-type]
    return [one_in_te(case, sp) for case in cases]


def one_in_te(case: Case, sp: bool) -> dict[str, Tensor]:
    group = dist.group.WORLD if dist.is_initialized() else ALONE
    sp = sp and group.size() > 1
    sharded = case.with_sp() if sp else case.sharded
    given = {name: tensor.to(DEVICE) for name, tensor in tensors(case).items()}
    module = build(case, sp, group)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(share(given[name], sharded.get(name), group))
    weights = [p for name, p in module.named_parameters() if name.endswith("weight") and "norm" not in name]
    if case.stride > 1 and case.marked:
        module.weight.partition_stride = case.stride
    for weight in weights:
        if case.main_grad:
            weight.main_grad = torch.full(weight.shape, 7.0, device=DEVICE)
    found: dict[str, Tensor] = {}
    for i in range(MICROBATCHES):
        x = share(given["x"][i], sharded.get("x"), group).requires_grad_()
        outputs = module(x, is_first_microbatch=(i == 0) if case.main_grad else None)
        y, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
        if case.bias == "returned":
            y = y + rest.pop(0)
        found[f"y{i}"] = gathered(y.detach(), sharded.get("y"), group)
        loss = (y * share(given["dy"][i], sharded.get("y"), group)).sum()
        if rest:
            found[f"norm{i}"] = gathered(rest[0].detach(), sharded.get("norm"), group)
            dnorm = share(given["dnorm"][i], sharded.get("norm"), group)
            if sp and case.return_norm == "gathered":
                dnorm = only_own_features(dnorm, group)
            loss = loss + (rest[0] * dnorm).sum()
        loss.backward()
        found[f"dx{i}"] = gathered(x.grad, sharded.get("x"), group)
    for name, parameter in module.named_parameters():
        grad = parameter.main_grad if case.main_grad and hasattr(parameter, "main_grad") else parameter.grad
        found[f"d{name}"] = gathered(grad, sharded.get(name), group)
    return found


def build(case: Case, sp: bool, group: Any) -> Any:
    import transformer_engine.pytorch as te

    shared = {
        "bias": case.bias != "none", "return_bias": case.bias == "returned", "params_dtype": case.dtype,
        "fuse_wgrad_accumulation": case.main_grad, "sequence_parallel": sp,
        "tp_group": None if group is ALONE else group, "tp_size": group.size(),
    }  # fmt: skip
    if case.module == "Linear" and case.mode is None:
        shared |= {"tp_group": None, "tp_size": 1, "sequence_parallel": False}
    norm = {"normalization": case.normalization, "zero_centered_gamma": case.zero_centered,
            "return_layernorm_output": case.return_norm != "no",
            "return_layernorm_output_gathered": case.return_norm == "gathered"}  # fmt: skip
    if case.module == "Linear":
        return te.Linear(I, O, parallel_mode=case.mode, **shared)
    if case.module == "LayerNormLinear":
        return te.LayerNormLinear(I, O, parallel_mode=case.mode, **shared, **norm)
    if "checkpoint" in inspect.signature(te.LayerNormMLP).parameters:  # from 2.11 on
        shared["checkpoint"] = case.checkpoint
    return te.LayerNormMLP(I, O, activation=case.activation, set_parallel_mode=True, **shared, **norm)


def in_torch(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same function, computed in `dtype`."""
    leaf = {name: t.to(dtype).requires_grad_() for name, t in tensors(case).items()}
    found = {}
    for i in range(MICROBATCHES):
        x = leaf["x"][i].detach().requires_grad_()
        h = x
        if case.module != "Linear":
            gamma = leaf["layer_norm_weight"] + (1 if case.zero_centered else 0)
            beta = leaf.get("layer_norm_bias")
            h = F.layer_norm(x, (I,), gamma, beta) if beta is not None else F.rms_norm(x, (I,), gamma, 1e-5)
            if case.return_norm != "no":
                found[f"norm{i}"] = h.detach()
            h_norm = h
        if case.module == "LayerNormMLP":
            h = F.linear(h, leaf["fc1_weight"], leaf.get("fc1_bias"))
            gate, *up = h.chunk(2, -1) if case.activation == "swiglu" else (h,)
            h = F.silu(gate) * up[0] if up else F.gelu(gate, approximate="tanh")
        y = F.linear(h, *(leaf.get(name) for name in weight_and_bias(case)))
        loss = (y * leaf["dy"][i].detach()).sum()
        if case.return_norm != "no":
            loss = loss + (h_norm * leaf["dnorm"][i].detach()).sum()
        loss.backward()
        found |= {f"y{i}": y.detach(), f"dx{i}": x.grad}
    parameters = [name for name in leaf if name not in ("x", "dy", "dnorm")]
    return {**found, **{f"d{name}": leaf[name].grad for name in parameters}}


def only_own_features(whole: Tensor, group: Any) -> Tensor:
    """Zeros but for this rank's share of the last dimension: the ranks' parts of a gradient that is summed."""
    own = torch.zeros_like(whole).chunk(group.size(), -1)
    own[group.rank()].copy_(whole.chunk(group.size(), -1)[group.rank()])
    return torch.cat(own, -1)


def weight_and_bias(case: Case) -> tuple[str, str]:
    return ("fc2_weight", "fc2_bias") if case.module == "LayerNormMLP" else ("weight", "bias")


def share(whole: Tensor, how: tuple[int, int] | None, group: Any) -> Tensor:
    if how is None:
        return whole.clone()
    dim, pieces = how
    return torch.cat(whole.chunk(group.size() * pieces, dim)[group.rank() :: group.size()], dim).clone()


def gathered(own: Tensor, how: tuple[int, int] | None, group: Any) -> Tensor:
    if how is None or group is ALONE:
        return own.cpu()
    dim, pieces = how
    return torch.cat([all_gather(piece.contiguous(), group, dim) for piece in own.chunk(pieces, dim)], dim)


def assert_right(found: dict[str, Tensor], case: Case) -> None:
    want = in_torch(case, torch.float64)
    assert found.keys() == want.keys()
    for name, value in want.items():
        error = ((found[name].double() - value).norm() / value.norm()).item()
        assert error < TOLERANCE[case.dtype], f"{name}: {error:.1e}"


def right_in_stock(case: Case) -> bool:
    """All but two: TE's own LayerNormLinear loses the gradient of its norm's output where that is to be gathered, and
    `checkpoint` asks for the state of CUDA's generator."""
    return not case.checkpoint and (case.module, case.return_norm) != ("LayerNormLinear", "gathered")


CASES = [
    Case("Linear", mode, bias, main_grad)
    for mode in ("row", "column", None)
    for bias in ("none", "fused", "returned")
    for main_grad in (False, True)
]
CASES += [
    Case("LayerNormLinear", "column", bias, main_grad, normalization, zero_centered, return_norm)
    for bias, main_grad, normalization, zero_centered, return_norm in (
        ("none", False, "RMSNorm", False, "no"), ("fused", True, "LayerNorm", False, "own"),
        ("returned", False, "RMSNorm", True, "own"), ("none", True, "LayerNorm", True, "no"),
        ("fused", False, "RMSNorm", False, "gathered"),
    )
]  # fmt: skip
CASES += [
    Case("LayerNormMLP", None, "none", False, "RMSNorm"),
    Case("LayerNormMLP", None, "fused", True, "LayerNorm", activation="gelu"),
    Case("LayerNormMLP", None, "returned", False, "LayerNorm", True, "own"),
    Case("LayerNormMLP", None, "none", False, "RMSNorm", return_norm="gathered"),
    Case("LayerNormMLP", None, "returned", True, "LayerNorm", return_norm="own", checkpoint=True),
]
CASES += [Case("Linear", "column", "fused", stride=2), Case("LayerNormLinear", "column", "none", True, stride=2)]
CASES += [replace(case, dtype=torch.bfloat16) for case in CASES[::3]]

"""Attention by itself, forward and backward, as one rank of Qwen3-8B has it: ours against flash attention's kernels.

The first that there is of torch's flash backend (FlashAttention 2), cuDNN's, those of the packages flash_attn and
flash_attn_interface (3) and Transformer Engine's own choice is what the others are divided by. FLOPs are flash
attention's: half of the scores, two products forward and five backward. Ours makes nine (`tpcheck.cost.terms`), for
no kernel of it adds what another computed, so its rate says how long it takes, not what its tensor cores do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from patches.contract import Contract
from patches.ops.attention import blockwise_attention
from patches.ops.sharded import Shards
from patches.order.visible import Visible
from tests.gpu.clock import Clock
from tpcheck.config.presets import PRESETS

__all__ = ["Attention", "Measured", "attentions"]

LEAVES = 8
ERROR_ROWS = 32
GIB = 1 << 30
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
# Preset; TP size and tokens, of one sequence: the telling ones first.
SCALES = {
    "cuda": ("qwen3-8b", ((1, 4096), (8, 4096), (8, 32768), (1, 16384), (2, 4096), (4, 4096))),
    "cpu": ("qwen3-tiny", ((1, 40), (2, 40))),
}


@dataclass(frozen=True)
class Attention:
    """One kernel at one shape: [tokens, 1, heads, width], causal."""

    who: str
    tp: int
    tokens: int
    heads: int
    groups: int
    width: int

    @property
    def name(self) -> str:
        return f"attention of TP={self.tp}, {self.tokens} tokens, {self.who}"

    @property
    def flops(self) -> float:
        """Of forward; backward has 2.5 times as many."""
        return 2.0 * self.heads * self.tokens**2 * self.width


def attentions(device: str) -> Iterator[Attention]:
    """At every shape stock first: ours is divided by it."""
    preset, shapes = SCALES[device]
    model = PRESETS[preset]
    for tp, tokens in shapes:
        heads, groups = model["num_attention_heads"] // tp, max(1, model["num_query_groups"] // tp)
        for who in [*_stock(device), "ours, blockwise"]:
            yield Attention(who, tp, tokens, heads, groups, model["head_dim"])


class Measured:
    """Measures kernels one by one and remembers how long the first one took at a shape."""

    def __init__(self) -> None:
        self._first: dict[tuple[int, int], dict[str, Any]] = {}

    def __call__(self, one: Attention, clock: Clock) -> dict[str, Any]:
        stock = _stock(clock.device).get(one.who)
        if stock is None:
            return self._row(one, _ours(one), clock)
        try:
            return self._row(one, stock(one), clock)
        except Exception as error:  # theirs may not take this shape, or not be built for this device
            return vars(one) | {"failed": f"{type(error).__name__}: {error}"[:120]}

    def _row(self, one: Attention, kernel: Kernel, clock: Clock) -> dict[str, Any]:
        q, k, v, dy = _operands(one, clock.device)
        y = kernel(q, k, v)

        def step() -> None:
            torch.autograd.grad(kernel(q, k, v), (q, k, v), dy)

        step()
        peak = _peak(step, clock.device)
        ms = clock.times({
            "forward": lambda: kernel(q, k, v),
            "backward": lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True),
        })  # fmt: skip
        row = {
            **vars(one), "forward_ms": ms["forward"], "backward_ms": ms["backward"], "gib": peak / GIB,
            "forward_tflops": one.flops / ms["forward"] / 1e9,
            "backward_tflops": 2.5 * one.flops / ms["backward"] / 1e9, "error": _error(y, q, k, v),
        }  # fmt: skip
        first = self._first.setdefault((one.tp, one.tokens), row)
        for way in ("forward", "backward"):
            row[f"{way}_over_first"] = first[f"{way}_ms"] / row[f"{way}_ms"]
        return row


def _operands(one: Attention, device: str) -> list[Tensor]:
    def random(heads: int, learns: bool = True) -> Tensor:
        shape = (one.tokens, 1, heads, one.width)
        return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=learns)

    return [random(one.heads), random(one.groups), random(one.groups), random(one.heads, False)]


def _ours(one: Attention) -> Kernel:
    shards = Shards(Contract(leaves=LEAVES // one.tp))

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return blockwise_attention(q, k, v, Visible(right=0), one.width**-0.5, one.groups, shards)

    return kernel


def _stock(device: str) -> dict[str, Callable[[Attention], Kernel]]:
    """Kernels of others that can be had here, by the name that the table shows."""
    found: dict[str, Callable[[Attention], Kernel]] = {
        "torch's flash": lambda one: partial(_sdpa, SDPBackend.FLASH_ATTENTION)
    }
    if device == "cuda":
        found["torch's cuDNN"] = lambda one: partial(_sdpa, SDPBackend.CUDNN_ATTENTION)
        for package, version in (("flash_attn", 2), ("flash_attn_interface", 3)):
            if find_spec(package):
                found[f"flash_attn {version}"] = lambda one, package=package: partial(_flash, package)  # type: ignore[misc]
        if find_spec("transformer_engine"):
            found["Transformer Engine's"] = _transformer_engine
    return found


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        x = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)


def _flash(package: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = import_module(package).flash_attn_func(*(x.transpose(0, 1) for x in (q, k, v)), causal=True)
    whole: Tensor = y[0] if isinstance(y, tuple) else y  # version 3 also returns each row's log-sum
    return whole.transpose(0, 1)


def _transformer_engine(one: Attention) -> Kernel:
    te: Any = import_module("transformer_engine.pytorch")
    module = te.DotProductAttention(
        one.heads, one.width, num_gqa_groups=one.groups, attention_dropout=0.0, attn_mask_type="causal",
        qkv_format="sbhd",
    )  # fmt: skip
    return lambda q, k, v: module(q, k, v).view(q.shape)


def _error(y: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative error of some rows of a head against float64."""
    rows = torch.linspace(0, len(y) - 1, min(ERROR_ROWS, len(y)), device=y.device).long()
    q_MD, k_ND, v_ND = (x.detach()[:, 0, 0].double() for x in (q, k, v))
    seen = torch.arange(len(y), device=y.device) <= rows[:, None]
    scores = (q_MD[rows] @ k_ND.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    want = scores.softmax(-1) @ v_ND
    return float((y.detach()[rows, 0, 0].double() - want).norm() / want.norm())


def _peak(step: Callable[[], None], device: str) -> int:
    """Bytes of a step beyond its operands; of a CPU nobody keeps count."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before

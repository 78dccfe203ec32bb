"""A gated MLP with norm, output layer and cross-entropy, made of `patches.ops`, and the same in torch's own functions;
the gradient of keys that heads share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from patches.aten.overrides import LocalInvariance
from patches.contract import Contract
from patches.ops.attention import repeat_for_heads
from patches.ops.bias import bias_per_token
from patches.ops.cross_entropy import cross_entropy
from patches.ops.linear import GradSink, column_parallel, row_parallel
from patches.ops.norm import norm
from patches.ops.sharded import Shards
from patches.order.collectives import all_gather
from tests.support.bits import unequal
from tests.support.ranks import on_ranks
from tests.support.sharding import gathered, share

S, B, H, FFN, V = 16, 3, 40, 88, 104


def assert_right_and_same_bits(
    strategy: Any, dtype: torch.dtype, centered: bool, layouts: Sequence[tuple[int, bool]]
) -> None:
    """About as near to float64 as torch's own in `dtype`, and the same bits in all `layouts`, which are (tp, sp)."""
    one = on_ranks(1, network, strategy, 8, False, dtype, centered)[0]
    usual = stock(dtype, centered, dtype)
    for name, want in stock(dtype, centered, torch.float64).items():
        ours, theirs = ((x[name].double() - want).norm() / want.norm() for x in (one, usual))
        assert ours < 1.5 * theirs + 2**-24, f"{name}: {ours:.1e}, torch's own in {dtype}: {theirs:.1e}"
    for tp, sp in layouts:
        for rank, other in enumerate(on_ranks(tp, network, strategy, 8, sp, dtype, centered)):
            assert not unequal(one, other), f"tp={tp} sp={sp} rank={rank}"


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (S, B, H), "gamma": (H,), "beta": (H,), "fc1": (2 * FFN, H), "b1": (2 * FFN,), "fc2": (H, FFN),
              "b2": (H,), "out": (V, H)}  # fmt: skip
    scale = {"out": 0.05}  # a soft softmax: its gradient is then not one token's cancellation
    return {name: (scale.get(name, 0.5) * torch.randn(shape, generator=g)).to(dtype) for name, shape in shapes.items()}


TARGET = torch.randint(0, V, (S, B), generator=torch.Generator().manual_seed(1))
SHARDED = {"fc1": (0, 2), "b1": (0, 2), "fc2": (1, 1), "out": (0, 1)}


def network(strategy: Any, leaves: int, sp: bool, dtype: torch.dtype, centered: bool) -> dict[str, Tensor]:
    """Loss and every gradient, as logical tensors."""
    group, how = dist.group.WORLD, SHARDED | ({"x": (0, 1)} if sp else {})
    contract = Contract(strategy, leaves)
    shards, tokens = Shards(contract, group), Shards(contract, group if sp else None)
    local = LocalInvariance("CPU")
    leaf = {name: share(w, how.get(name), group).requires_grad_() for name, w in weights(dtype).items()}
    y = norm(leaf["x"], leaf["gamma"], leaf["beta"] if centered else None, 1e-5, centered, 0, tokens)
    gate, up = column_parallel(y, leaf["fc1"], leaf["b1"], shards, sp, GradSink(), pieces=2).chunk(2, -1)
    z = row_parallel(F.silu(gate) * up, leaf["fc2"], shards, sp, GradSink())
    z = z + bias_per_token(leaf["b2"], z.shape, tokens)
    logits = column_parallel(z, leaf["out"], None, shards, sp, GradSink())
    loss = cross_entropy(logits, TARGET, shards)
    loss.sum().backward()
    local.remove()
    whole = {name: gathered(w.grad, how.get(name), group) for name, w in leaf.items() if w.grad is not None}
    return {"loss": loss.detach(), **whole}


def stock(dtype: torch.dtype, centered: bool, compute: torch.dtype) -> dict[str, Tensor]:
    leaf = {name: w.to(compute).requires_grad_() for name, w in weights(dtype).items()}
    x = leaf["x"]
    y = F.layer_norm(x, (H,), leaf["gamma"], leaf["beta"]) if centered else F.rms_norm(x, (H,), leaf["gamma"], 1e-5)
    gate, up = F.linear(y, leaf["fc1"], leaf["b1"]).chunk(2, -1)
    z = F.linear(F.silu(gate) * up, leaf["fc2"], leaf["b2"])
    loss = F.cross_entropy(
        F.linear(z, leaf["out"]).flatten(0, 1).to(max(compute, torch.float32, key=lambda d: d.itemsize)),
        TARGET.flatten(),
        reduction="none",
    ).view(S, B)
    loss.sum().backward()
    return {"loss": loss.detach(), **{name: w.grad for name, w in leaf.items() if w.grad is not None}}


def attention_keys(strategy: Any, groups: int, heads: int) -> Tensor:
    """Gradient of shared keys: this rank's groups, or the sharers' one, gathered as Megatron's QKV gather sums it."""
    group = dist.group.WORLD
    size, rank = group.size(), group.rank()
    g = torch.Generator().manual_seed(0)
    kv, grad = torch.randn(5, 2, groups, 4, generator=g), torch.randn(5, 2, heads, 4, generator=g)
    mine = kv.repeat_interleave(max(1, size // groups), 2).chunk(size, 2)[rank].clone().requires_grad_()
    repeat = heads // size // mine.shape[2]
    repeat_for_heads(mine, repeat, groups, Shards(Contract(strategy), group)).backward(grad.chunk(size, 2)[rank])
    parts = all_gather(mine.grad, group, 2)
    return parts.unflatten(2, (groups, -1)).sum(3)

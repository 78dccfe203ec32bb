"""The sums that are no products, as the layers call them, for `bench.py`: with the bytes that have to move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patches.aten.overrides import LocalInvariance
from patches.contract import Contract
from patches.ops.cross_entropy import cross_entropy
from patches.ops.norm import norm
from patches.ops.sharded import Shards
from patches.order.backend import backend
from patches.order.grad_norm import gradient_norm


@dataclass(frozen=True)
class Sum:
    """One call, what torch has in its place, and the bytes that are read and written at least.

    `call` is timed with ATen's kernels overridden as in a patched run, `stock` without.
    """

    name: str
    shape: str
    bytes: int
    call: Callable[[], object]
    stock: Callable[[], object]


@contextmanager
def overridden(device: str) -> Iterator[None]:
    """ATen's kernels as a patched run has them."""
    local = LocalInvariance(device.upper())
    try:
        yield
    finally:
        local.remove()


# tokens, hidden, vocabulary of a rank, heads and length of attention, gradients, ranks: Qwen3-8B at TP=8
SCALES = {"cuda": (8192, 4096, 151936 // 8, (4, 2048), 1 << 28, 8), "cpu": (16, 32, 64, (2, 8), 1 << 10, 2)}


def sums(device: str) -> Iterator[Sum]:
    tokens, hidden, vocab, (heads, length), gradients, ranks = SCALES[device]
    yield from _norms(device, tokens, hidden)
    yield from _cross_entropies(device, tokens, vocab)
    yield from _softmaxes(device, heads, length)
    yield _embedding(device, tokens, hidden, vocab)
    grads = [torch.randn(gradients // 8, device=device) for _ in range(8)]
    total = torch.nn.utils.get_total_norm
    on = torch.device(device)
    yield Sum(
        "gradient norm", f"{gradients}", 4 * gradients, lambda: gradient_norm(grads, [], on), lambda: total(grads)
    )
    roots = torch.randn(ranks, tokens // ranks, hidden, device=device)
    yield Sum(
        "tree sum of ranks' roots", f"{ranks} x {tokens // ranks} x {hidden}",
        roots.nbytes + roots[0].numel() * 2,
        lambda: _tree_sum(roots), lambda: roots.sum(0).bfloat16(),
    )  # fmt: skip


def _tree_sum(roots: Tensor) -> Tensor:
    """What a rank does with the roots that it received."""
    return backend(roots.device).rounded_tree_sum(roots.flatten(1), torch.bfloat16)


def _norms(device: str, tokens: int, hidden: int) -> Iterator[Sum]:
    x = torch.randn(tokens, 1, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    gamma = torch.ones(hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    whole = Shards(Contract())

    def ours() -> Tensor:
        return norm(x, gamma, None, 1e-6, False, 0, whole)

    def stock() -> Tensor:
        return F.rms_norm(x, (hidden,), gamma, 1e-6)

    shape = f"{tokens} x {hidden}"
    yield Sum("RMSNorm forward", shape, 2 * x.nbytes, ours, stock)
    backward = (_backward(make(), (x, gamma), dy) for make in (ours, stock))
    yield Sum("RMSNorm backward", shape, 3 * x.nbytes, *backward)


def _cross_entropies(device: str, tokens: int, vocab: int) -> Iterator[Sum]:
    logits = torch.randn(tokens, 1, vocab, device=device, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, vocab, (tokens, 1), device=device)
    dloss = torch.ones(tokens, 1, device=device)
    whole = Shards(Contract())

    def ours() -> Tensor:
        return cross_entropy(logits, target, whole)

    def stock() -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none").view(tokens, 1)

    shape = f"{tokens} x {vocab}"
    # Forward reads logits and keeps the softmax; backward reads that and writes the gradient.
    yield Sum("cross-entropy forward", shape, 3 * logits.nbytes, ours, stock)
    yield Sum(
        "cross-entropy backward", shape, 3 * logits.nbytes, *(_backward(f(), (logits,), dloss) for f in (ours, stock))
    )


def _softmaxes(device: str, heads: int, length: int) -> Iterator[Sum]:
    scores = torch.randn(1, heads, length, length, device=device, dtype=torch.bfloat16)
    yield Sum("softmax", f"{heads} x {length} x {length}", 2 * scores.nbytes, *both(lambda: torch.softmax(scores, -1)))


def _embedding(device: str, tokens: int, hidden: int, vocab: int) -> Sum:
    weight = torch.randn(vocab, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, vocab, (tokens,), device=device)
    dy = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    backward = _backward(F.embedding(ids, weight), (weight,), dy)
    size = dy.nbytes + weight.nbytes
    return Sum("embedding backward", f"{tokens} x {hidden}", size, *both(backward))


def _backward(y: Tensor, leaves: tuple[Tensor, ...], dy: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def both(call: Callable[[], object]) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same call, overridden and not."""
    return call, call

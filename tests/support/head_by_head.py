"""Attention that computes each head by itself, and the same with one result spoilt by a bit."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.3) -> Tensor:
    """[s, b, heads, d], one head and sample at a time: no library sees how many there are."""
    y = torch.empty_like(q)
    for b in range(q.shape[1]):
        for h in range(q.shape[2]):
            weights = torch.softmax((q[:, b, h].clone() @ k[:, b, h].clone().t()) * scale, -1)
            y[:, b, h] = weights @ v[:, b, h].clone()
    return y


class Spoilt(torch.autograd.Function):
    """`attention` with its n-th result (output, dq, dk, dv) changed by the last bit of one element."""

    @staticmethod
    def forward(ctx, q, k, v, which, delta):
        ctx.save_for_backward(q, k, v)
        ctx.which, ctx.delta = which, delta
        y = attention(q, k, v)
        return nudged(y, delta) if which == 0 else y

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            qkv = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            grads = list(torch.autograd.grad(attention(*qkv), qkv, dy))
        if ctx.which:
            grads[ctx.which - 1] = nudged(grads[ctx.which - 1], ctx.delta)
        return *grads, None, None


def nudged(x: Tensor, units: int) -> Tensor:
    x = x.detach().clone()
    x.view(torch.int32).view(-1)[-1] += units
    return x

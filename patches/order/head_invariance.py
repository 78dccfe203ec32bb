"""Whether an attention kernel computes each head by itself: the only thing that tensor parallelism asks of it.

    heads   0 1 2 3 4 5 6 7      TP=1          A head's output and gradients must have the same bits whichever heads
            0 1 2 3|4 5 6 7      TP=2          are in the call with it, and in every call: no order of summation that
            0 1|2 3|4 5|6 7      TP=4          follows the number of heads, no atomic addition.

Fused kernels may keep that or not, by version, shape and device (split keys where heads are few, dq added atomically):
it is measured, with random operands of the very shape, never assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Kernel", "find_head_dependence"]

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NAMES = ("the output", "dq", "dk", "dv")


def find_head_dependence(
    attention: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    dim: int,
    parts: Sequence[int] = (1, 2, 4, 8),
    backward: bool = True,
) -> str | None:
    """What depends on the heads of a call, or differs from one call to the next; None if nothing does.

    Args:
        attention: of q, k, v, with a result in q's layout.
        q, k, v: only their dtype, device and shape count; `heads` takes the place of their size along `dim`.
        heads: of the whole model, as TP=1 sees them.
        parts: into how many equal parts the heads are cut; 1 asks whether the call can be repeated.
    """
    generator = torch.Generator(q.device).manual_seed(0)
    dy = q.new_empty((*q.shape[:-1], v.shape[-1]))
    operands = [_random(like, heads, dim, generator) for like in (q, k, v, dy)]
    whole = _results(attention, operands, backward)
    for count in parts:
        if heads % count:
            continue
        for part in range(count):
            found = _results(attention, [x.chunk(count, dim)[part].contiguous() for x in operands], backward)
            for name, mine, alone in zip(NAMES, whole, found, strict=False):
                if not _same_bits(mine.chunk(count, dim)[part], alone):
                    if count == 1:
                        return f"{name} differs from one call to the next"
                    return f"{name} of a head differs when {heads // count} heads are computed instead of {heads}"
    return None


def _random(like: Tensor, heads: int, dim: int, generator: torch.Generator) -> Tensor:
    shape = list(like.shape)
    shape[dim] = heads
    return torch.randn(shape, dtype=torch.float32, device=like.device, generator=generator).to(like.dtype)


def _results(attention: Kernel, operands: Sequence[Tensor], backward: bool) -> list[Tensor]:
    """The output and, if `backward`, the gradients; whatever the caller records of its own graph stays untouched."""
    *qkv, dy = operands
    # A layer that is checkpointed packs what is saved here too; the innermost hooks are these.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        qkv = [x.detach().requires_grad_(backward) for x in qkv]
        y = attention(*qkv)
        gradients = torch.autograd.grad(y, qkv, dy) if backward else ()
    return [y.detach(), *gradients]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(*(x.contiguous().view(BITS[x.element_size()]) for x in (a, b)))

"""The order of `kernels.pairs`, in torch on the CPU: what every kernel must give, bit by bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patches.order.tree import cuts, tree_sum

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_pairs(x: Tensor, dim: int = -1) -> Tensor:
    """Σx along `dim` in float32: adjacent pairs, then pairs of pairs, …, zeros at the end."""
    x = x.cpu().float().movedim(dim, -1)
    if not x.shape[-1]:
        return x.sum(-1)
    while x.shape[-1] > 1:
        x = F.pad(x, (0, x.shape[-1] % 2))
        x = x[..., 0::2] + x[..., 1::2]
    return x.squeeze(-1) + 0.0


def leaves_by_pairs(x_SB: Tensor, leaves: int) -> Tensor:
    """The tree over leaves of the first dimension, each by pairs; [S, inner, B] has all of `inner` in each."""
    parts = (x_SB[lo:hi].reshape(-1, x_SB.shape[-1]) for lo, hi in cuts(x_SB.shape[0], leaves))
    return tree_sum(by_pairs(part, 0) for part in parts)


def assert_close(x: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """|x - exact| ≤ bound, beside the rounding to the dtype of `x`; equal where `exact` is not finite."""
    x = x.cpu()
    error = (x.double() - exact).abs()
    allowed = bound + exact.abs() * torch.finfo(x.dtype).eps + torch.finfo(x.dtype).smallest_normal
    wrong = torch.where(exact.isfinite(), ~(error <= allowed), ~((x == exact) | (x.isnan() & exact.isnan())))
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {x.numel()}, worst {float((error / allowed).nan_to_num().max()):.2f}"
    )

"""Shares of a logical tensor that ranks have, and the tensor of their shares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from patches.order.collectives import all_gather

ALONE: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # in the place of a group of one rank

How = tuple[int, int] | None  # which dimension is cut, and how many pieces of it are cut each; None: the whole


def share(whole: Tensor, how: How, group: Any) -> Tensor:
    if how is None:
        return whole.clone()
    dim, pieces = how
    return torch.cat(whole.chunk(group.size() * pieces, dim)[group.rank() :: group.size()], dim).clone()


def gathered(own: Tensor, how: How, group: Any) -> Tensor:
    if how is None or group is ALONE:
        return own.cpu()
    dim, pieces = how
    return torch.cat([all_gather(piece.contiguous(), group, dim) for piece in own.chunk(pieces, dim)], dim)

"""Attention by blocks of keys in torch: what `order.kernels.attentions` does, each block's products and sums exact.

    (o | l) = (o | l)·2^((m - m')·c) + p·(v | 1)       p, m and the blocks as there, the blocks in their order
    dq      = Σ ds·k                                   of blocks, in their order
    dk, dv  of a query head: one exact leaf over the queries

Legend: S rows of a sequence, B sequences, H query heads, G heads of keys and values, D width of a head; of one
sequence X = B·H heads, M queries that see some of the N keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from patches.order.exact.exponentials import exp2
from patches.order.exact.products import exact_product
from patches.order.exact.slices import rounded
from patches.order.exact.sums import rounded_sum
from patches.order.polynomials import LOG2_E
from patches.order.visible import Visible, check_operands, keys_at_once

__all__ = ["attention", "attention_gradient", "check_attention"]


def check_attention(device: torch.device, width: int, dtype: torch.dtype, packed: bool, windowed: bool) -> None:
    """Nothing to try: torch adds the blocks in the order that is written here, whatever CPU it runs on."""


def attention(
    q_SBHD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, visible: Visible, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scale·q·kᵀ)·v in the dtype of q; float32 [H, B·S] each query's largest score and one over its sum."""
    check_operands(q_SBHD, k_SBGD, v_SBGD, scale)
    S, B, H, _ = q_SBHD.shape
    y = torch.zeros(q_SBHD.shape, dtype=q_SBHD.dtype, device=q_SBHD.device)
    top, inverse = (torch.zeros(H, B, S, dtype=torch.float32, device=y.device) for _ in range(2))
    for queries, keys in _sequences(visible, S, len(k_SBGD)):
        q_XSD, k_XSD, v_XSD = (_heads(x, H) for x in (q_SBHD[queries], k_SBGD[keys], v_SBGD[keys]))
        o_XSD, l_XS, m_XS = _walk(q_XSD, k_XSD, v_XSD, visible, scale * LOG2_E)
        none = m_XS == -torch.inf
        inverse_XS = torch.where(none, 0.0, 1.0 / torch.where(none, 1.0, l_XS))
        y[queries] = _apart(rounded(o_XSD * inverse_XS.unsqueeze(-1), y.dtype), B)
        for kept, found_XS in ((top, torch.where(none, 0.0, m_XS)), (inverse, inverse_XS)):
            kept[..., queries] = found_XS.unflatten(0, (B, H)).transpose(0, 1)
    return y, top.flatten(1), inverse.flatten(1)


def attention_gradient(
    dy_SBHD: Tensor, q_SBHD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, y_SBHD: Tensor, top: Tensor, inverse: Tensor,
    visible: Visible, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq in its dtype, and what every query head gives dk and dv: float32 [S, B, H, D] each."""
    S, B, H, D = q_SBHD.shape
    dq = torch.zeros(q_SBHD.shape, dtype=q_SBHD.dtype, device=q_SBHD.device)
    dk, dv = (torch.zeros(len(k_SBGD), B, H, D, dtype=torch.float32, device=dq.device) for _ in range(2))
    delta = rounded_sum(dy_SBHD.float() * y_SBHD.float(), -1).permute(2, 1, 0)
    top, inverse = top.view(H, B, S), inverse.view(H, B, S)
    for queries, keys in _sequences(visible, S, len(k_SBGD)):
        operands = [_heads(x[queries], H) for x in (q_SBHD, dy_SBHD)] + [_heads(x[keys], H) for x in (k_SBGD, v_SBGD)]
        numbers = [x[..., queries].transpose(0, 1).flatten(0, 1).unsqueeze(-1) for x in (top, inverse, delta)]
        dq_XSD, dk_XSD, dv_XSD = _walk_back(operands, numbers, visible, scale)
        dq[queries], dk[keys], dv[keys] = _apart(rounded(dq_XSD, dq.dtype), B), _apart(dk_XSD, B), _apart(dv_XSD, B)
    return dq, dk, dv


def _walk(
    q_XSD: Tensor, k_XSD: Tensor, v_XSD: Tensor, visible: Visible, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of p·v, of p, and the largest scores, -∞ where no key is seen."""
    o_XSD = torch.zeros(q_XSD.shape, dtype=torch.float32, device=q_XSD.device)
    l_XS = o_XSD.new_zeros(o_XSD.shape[:2])
    m_XS = torch.full_like(l_XS, -torch.inf)
    for keys, rows, seen_MN in _blocks(q_XSD, k_XSD, visible):
        s_XMN = exact_product(q_XSD[:, rows], k_XSD[:, keys].mT).masked_fill_(~seen_MN, -torch.inf)
        before, after = m_XS[:, rows], torch.maximum(m_XS[:, rows], s_XMN.amax(-1))
        shift = torch.where(after == -torch.inf, 0.0, after)  # nothing seen yet
        p_XMN = exp2((s_XMN - shift.unsqueeze(-1)) * factor).to(q_XSD.dtype)
        shrink = exp2((before - shift) * factor)
        l_XS[:, rows] = l_XS[:, rows] * shrink + rounded_sum(p_XMN, -1)
        o_XSD[:, rows] = o_XSD[:, rows] * shrink.unsqueeze(-1) + exact_product(p_XMN, v_XSD[:, keys])
        m_XS[:, rows] = after
    return o_XSD, l_XS, m_XS


def _walk_back(
    operands: list[Tensor], numbers: list[Tensor], visible: Visible, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q_XSD, dy_XSD, k_XSD, v_XSD = operands
    dtype = q_XSD.dtype
    dq_XSD = torch.zeros(q_XSD.shape, dtype=torch.float32, device=q_XSD.device)
    dk_XSD, dv_XSD = (dq_XSD.new_zeros(k_XSD.shape) for _ in range(2))
    for keys, rows, seen_MN in _blocks(q_XSD, k_XSD, visible):
        q, dy, top, inverse, delta = (x[:, rows] for x in (q_XSD, dy_XSD, *numbers))
        s_XMN = exact_product(q, k_XSD[:, keys].mT)
        p_XMN = (exp2((s_XMN - top) * (scale * LOG2_E)) * inverse).masked_fill_(~seen_MN, 0.0)
        ds_XMN = (p_XMN * (exact_product(dy, v_XSD[:, keys].mT) - delta)).masked_fill_(~seen_MN, 0.0).to(dtype)
        dq_XSD[:, rows] += exact_product(ds_XMN, k_XSD[:, keys])
        dk_XSD[:, keys] = exact_product(ds_XMN.mT, q)
        dv_XSD[:, keys] = exact_product(p_XMN.to(dtype).mT, dy)
    return dq_XSD * scale, rounded(dk_XSD * scale, torch.float32), dv_XSD


def _sequences(visible: Visible, queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Rows of queries and of keys of every sequence, or of a whole batch whose sequences are of one length."""
    packed = visible.packed
    if packed is None:
        yield slice(queries), slice(keys)
        return
    table = (packed.q_starts, packed.q_lengths, packed.k_starts, packed.k_lengths)
    for q_start, q_length, k_start, k_length in zip(*(x.tolist() for x in table), strict=True):
        yield slice(q_start, q_start + q_length), slice(k_start, k_start + k_length)


def _blocks(q_XSD: Tensor, k_XSD: Tensor, visible: Visible) -> Iterator[tuple[slice, slice, Tensor]]:
    """Every block of keys that some query sees: the keys, from the first to the last such query, and who sees what."""
    queries, keys, step = q_XSD.shape[1], k_XSD.shape[1], keys_at_once(q_XSD.shape[2], q_XSD.dtype)
    position = visible.offset + torch.arange(queries, device=q_XSD.device)
    for n in range(0, keys, step):
        end = min(n + step, keys)
        first = 0 if visible.right is None else max(0, n - visible.right - visible.offset)
        last = queries if visible.left is None else min(queries, end + visible.left - visible.offset)
        if first < last:
            apart = torch.arange(n, end, device=q_XSD.device) - position[first:last, None]
            seen = torch.ones_like(apart, dtype=torch.bool)
            if visible.left is not None:
                seen &= apart >= -visible.left
            if visible.right is not None:
                seen &= apart <= visible.right
            yield slice(n, end), slice(first, last), seen


def _heads(x_SBGD: Tensor, heads: int) -> Tensor:
    """[S, B, G, D] as [B·heads, S, D], each of G repeated for its query heads."""
    x_BGSD = x_SBGD.permute(1, 2, 0, 3)
    return x_BGSD.repeat_interleave(heads // x_BGSD.shape[1], 1).flatten(0, 1)


def _apart(x_XSD: Tensor, batch: int) -> Tensor:
    """[B·H, S, D] as [S, B, H, D]."""
    return x_XSD.unflatten(0, (batch, -1)).permute(2, 0, 1, 3)

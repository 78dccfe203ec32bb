"""Attention in float64 and how far from it float32 sums may be; what no row's bits may depend on.

To first order, with u = 2^-24, e half a unit of the dtype that p and ds are rounded to, tensor cores cutting where
others round (2u an addition), P the probabilities and S, D the lengths of sums:
    a score       2u(D + 1)·Σ|q·k|, times scale; its exponent, 3u each of |x| and of 8 for subtraction, factor, 2^x
    p             relatively ε = that + e, and smaller than the dtype's smallest number by as much
    y             Σ P|v|·(ε + Σ P·ε) + 2u(S + 8)·Σ P|v|
    dv, ds, dq, dk  likewise; ds = P·(dP - delta), where delta has the error of y, rounded, in it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patches.order.visible import Packed, Visible
from tests.patches.kernels.by_pairs import assert_close
from tests.support.bits import assert_same_bits

U = 2.0**-24
LN2 = math.log(2)


def operands(S: int, T: int, B: int, H: int, G: int, D: int, dtype: torch.dtype, device: Any = "cpu") -> list[Tensor]:
    """Random q, k, v, dy."""
    shapes = ((S, B, H, D), (T, B, G, D), (T, B, G, D), (S, B, H, D))
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def results(package: Any, qkvd: list[Tensor], visible: Visible, scale: float = 0.3) -> list[Tensor]:
    """y, dq, and what each query head gives dk and dv."""
    q, k, v, dy = qkvd
    y, top, inverse = package.attention(q, k, v, visible, scale)
    return [y, *package.attention_gradient(dy, q, k, v, y, top, inverse, visible, scale)]


def assert_right(package: Any, qkvd: list[Tensor], visible: Visible, scale: float = 0.3) -> None:
    """`results` are within the bounds above of float64's."""
    found = results(package, qkvd, visible, scale)
    for name, x, (exact, bound) in zip(("y", "dq", "dk", "dv"), found, _float64(qkvd, visible, scale), strict=True):
        try:
            assert_close(x, exact, 1.1 * bound)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def seen(visible: Visible, queries: int, keys: int) -> Tensor:
    at, key = visible.offset + torch.arange(queries)[:, None], torch.arange(keys)[None]
    inside = torch.ones(queries, keys, dtype=torch.bool)
    if visible.left is not None:
        inside &= key >= at - visible.left
    if visible.right is not None:
        inside &= key <= at + visible.right
    return inside


def _float64(qkvd: list[Tensor], visible: Visible, scale: float) -> list[tuple[Tensor, Tensor]]:
    dtype, repeat = qkvd[0].dtype, qkvd[0].shape[2] // qkvd[1].shape[2]
    e = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    tiny = 0.0 if dtype == torch.float32 else torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    q, k, v, dy = (x.cpu().double().permute(1, 2, 0, 3) for x in qkvd)
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    S, D, T = q.shape[2], q.shape[3], k.shape[2]
    scores = (q @ k.mT * scale).masked_fill(~seen(visible, S, T), -math.inf)
    P = torch.softmax(scores, -1).nan_to_num(0.0)
    x = (scores.amax(-1, keepdim=True) - scores).nan_to_num(0.0, 0.0).clamp(max=90)
    error = scale * 2 * U * (D + 1) * (q.abs() @ k.abs().mT) + U * (3 * x + 8) + e
    error = error + (error * P).sum(-1, keepdim=True) + 2 * U * (T + 8)  # of P, relatively: of p and of its sum
    y, y_error = P @ v, (P * error + tiny) @ v.abs() + 2 * U * (T + 8) * (P @ v.abs())
    of_p = P * (error + e) + tiny
    dv, dv_error = P.mT @ dy, of_p.mT @ dy.abs() + 2 * U * (S + 8) * (P.mT @ dy.abs())
    dP, delta = dy @ v.mT, (dy * y).sum(-1, keepdim=True)
    ds = P * (dP - delta)
    delta_error = (dy.abs() * (y_error + y.abs() * max(e, U)) + 2 * U * math.log2(2 * D) * (dy * y).abs()).sum(
        -1, keepdim=True
    )
    of_difference = 2 * U * (D + 1) * (dy.abs() @ v.abs().mT) + delta_error + U * (dP - delta).abs()
    ds_error = of_p * (dP - delta).abs() + (P + of_p) * of_difference + e * ds.abs() + tiny
    pairs = [(y, y_error)]
    for left, right, length in ((ds, k, T), (ds.mT, q, S)):
        of_left = ds_error if left is ds else ds_error.mT
        size = left.abs() @ right.abs()
        pairs.append((scale * (left @ right), scale * (of_left @ right.abs() + 2 * U * (length + 8) * size)))
    return [(a.permute(2, 0, 1, 3), b.permute(2, 0, 1, 3)) for a, b in (*pairs, (dv, dv_error))]


def assert_rows_see_their_own_alone(
    package: Any, device: Any, dtype: torch.dtype, S: int, D: int, visible: Visible
) -> None:
    """The same bits of a head among others or alone, of a sequence in a batch, padded, packed, or cut into chunks."""
    B, H, G = 2, 4, 2
    qkvd = operands(S, S, B, H, G, D, dtype, device)
    q, k, v, dy = qkvd
    one = [x[:, 1:, lo:hi] for x, lo, hi in ((q, 2, 4), (k, 1, 2), (v, 1, 2), (dy, 2, 4))]
    expected = [x[:, 1:, 2:] for x in results(package, qkvd, visible)]
    _assert_same(results(package, one, visible), expected)
    _assert_padding_has_no_say(package, one, visible, expected)
    _assert_chunks_are_rows(package, one, visible, expected)
    _assert_packed_is_each(package, qkvd, device)


def _assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, x, y in zip(("y", "dq", "dk", "dv"), found, expected, strict=True):
        assert x.shape == y.shape, name
        assert_same_bits(x.contiguous(), y.contiguous())


def _assert_padding_has_no_say(package: Any, qkvd: list[Tensor], visible: Visible, expected: list[Tensor]) -> None:
    """Rows after the end that nobody before them sees, and whose output has no gradient."""
    S, more = len(qkvd[0]), 37
    padded = [torch.cat([x, torch.randn_like(x[:more]) * (i < 3)]) for i, x in enumerate(qkvd)]
    _assert_same([x[:S] for x in results(package, padded, visible)], expected)


def _assert_chunks_are_rows(package: Any, qkvd: list[Tensor], visible: Visible, expected: list[Tensor]) -> None:
    """Queries from some position on, at an offset, with all keys: y and dq."""
    q, k, v, dy = qkvd
    start = len(q) // 2 + 3
    chunk = Visible(visible.left, visible.right, offset=start)
    found = results(package, [q[start:], k, v, dy[start:]], chunk)
    _assert_same([*found[:2], *expected[2:]], [*(x[start:] for x in expected[:2]), *expected[2:]])


def _assert_packed_is_each(package: Any, qkvd: list[Tensor], device: Any) -> None:
    lengths, starts = (1, len(qkvd[0]) - 9, 0, 5), (0, 1, len(qkvd[0]) - 8, len(qkvd[0]) - 6)  # two rows of padding
    table = [torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths) * 2]
    rows = [x[:, :1, : x.shape[2] // 2] for x in qkvd]
    visible = Visible(right=0, packed=Packed(*table, max(lengths), max(lengths)))
    packed = results(package, rows, visible)
    for start, length in zip(starts, lengths, strict=True):
        if length:
            own = slice(start, start + length)
            _assert_same([x[own] for x in packed], results(package, [x[own] for x in rows], Visible(right=0)))
    for x in packed:
        assert not x[len(x) - 8 : len(x) - 6].any()


def assert_chunks_have_their_bits(
    compute: Any, qkvd: list[Tensor], visible: Visible, several: Sequence[int], exactly: bool
) -> None:
    """Queries in chunks, each by itself, have the outputs and gradients that they have among all; where sums are exact,
    keys' gradients are the sum over chunks but for rounding."""
    y, dq, dk, dv = (x[0] if n > 1 else x for n, x in enumerate(_by_chunks(compute, qkvd, 1, visible)))
    for chunks in several:
        y_again, dq_again, *parts = _by_chunks(compute, qkvd, chunks, visible)
        assert_same_bits(y_again, y)
        assert_same_bits(dq_again, dq)
        for of_chunks, whole in zip(parts, (dk, dv), strict=True) if exactly else ():
            # Each is rounded to float32 twice, as a sum and as it is scaled, and so is the whole.
            bound = of_chunks.double().abs().sum(0) * 4 * U
            assert ((of_chunks.double().sum(0) - whole.double()).abs() <= bound).all()


def _by_chunks(compute: Any, qkvd: list[Tensor], chunks: int, visible: Visible) -> list[Tensor]:
    """y, dq, and what each chunk of the queries gives every head's keys and values, [chunks, ..]."""
    q, k, v, dy = qkvd
    rows, found = len(q) // chunks, []
    for i in range(chunks):
        own, seen = slice(i * rows, (i + 1) * rows), replace(visible, offset=i * rows)
        y, top, inverse = compute.attention(q[own], k, v, seen, 0.3)
        found.append([y, *compute.attention_gradient(dy[own], q[own], k, v, y, top, inverse, seen, 0.3)])
    ys, dqs, dks, dvs = zip(*found, strict=True)
    return [torch.cat(ys), torch.cat(dqs), torch.stack(dks), torch.stack(dvs)]

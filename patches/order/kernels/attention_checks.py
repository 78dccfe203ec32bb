"""What is tried on a device before attention's first use: its order of sums, its neighbours' silence, its values.

    order     Scores are all 0, so p is 1, and values are picked whose float32 sum tells in which order blocks came:
              2^12, 2^-12 and -2^12 add up to 2^-12 if the small one is the last of the three, and else to 0, whether
              the sum is rounded or cut. A column for every choice of a small one and two others of four blocks, so that
              all but the order of the first two shows (and they commute). Forward and dq over keys, dk and dv over
              queries: from position 0, in one chain. Two halves, added later, or atomics, are another order.
    others    A head alone, a sequence alone, longer, cut into chunks of queries, or packed beside others, gives the
              bits of all of them together, launched several times, so that a race has chances to show.
    values    Some rows of y against float64, within the bound below.

Each kind of kernel (`Kind`) is tried for itself, at the tile that it has: what is compiled is what training launches.

Bound of y, to first order, u = 2^-24, e half a unit of p's dtype, T keys, D a head's width, P the probabilities, tensor
cores cutting where others round (2u an addition): a score is off by 2u(D + 1)·Σ|q·k|·scale, its exponent x by
u(3|x| + 8), and p by ε = that + e, relatively; so y by Σ P|v|·(ε + Σ P·ε) + 2u(T + 8)·Σ P|v| + e·|y|. Twice that
is allowed, for what is not of first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from patches.contract import UnsupportedError
from patches.order.kernels import attentions
from patches.order.kernels.pairs import INTERPRETED, power_of_two
from patches.order.visible import Packed, Visible, keys_at_once

__all__ = ["check_attention"]

BLOCKS = 4
LARGE, SMALL = 2.0**12, 2.0**-12  # whose sum float32 does not hold, and fp16 both
TIMES = 1 if INTERPRETED else 3
BATCH, HEADS, GROUPS = (2, 2, 1) if INTERPRETED else (2, 8, 2)
ROUNDS = 0 if INTERPRETED else 5  # of blocks, that random rows see
NAMES = ("y", "dq", "dk", "dv")


class Kind(NamedTuple):
    """What attention's kernels are compiled for."""

    width: int
    dtype: torch.dtype
    packed: bool
    windowed: bool

    def __str__(self) -> str:
        how = "packed " * self.packed + "windowed " * self.windowed
        return f"{how}heads of {self.width} in {str(self.dtype).removeprefix('torch.')}"


def check_attention(device: torch.device, width: int, dtype: torch.dtype, packed: bool, windowed: bool) -> None:
    """Try attention of heads of a `width` on this very `device`.

    Raises:
        UnsupportedError: a sum has another order, a row's bits depend on what else is there, or y is wrong.
    """
    kind = Kind(width, dtype, packed, windowed)
    step = keys_at_once(kind.width, kind.dtype)
    _check_order(device, kind)
    # Operands of one seed, whatever torch's generators are at: a check must not move them.
    generator = torch.Generator("cpu").manual_seed(0)
    S = ROUNDS * step + step // 4 + 5

    def random(heads: int) -> Tensor:
        numbers = torch.randn((S, BATCH, heads, kind.width), generator=generator, device="cpu")
        return numbers.to(device, kind.dtype)

    qkvd = [random(HEADS), random(GROUPS), random(GROUPS), random(HEADS)]
    visible = _visible(kind, S, [(0, S)], device)
    one = [x[:, :1] for x in qkvd] if kind.packed else qkvd
    whole = _results(one, visible)
    for what, call, rows in (_packed if kind.packed else _neighbours)(kind, one, visible):
        for _ in range(TIMES):
            _same_bits(kind, what, call(), rows(whole))
    _check_values(kind, one, visible, whole[0])


def _results(qkvd: list[Tensor], visible: Visible, scale: float = 0.3) -> list[Tensor]:
    """y, dq, and what each query head gives dk and dv."""
    q, k, v, dy = qkvd
    y, top, inverse = attentions.attention(q, k, v, visible, scale)
    return [y, *attentions.attention_gradient(dy, q, k, v, y, top, inverse, visible, scale)]


def _visible(kind: Kind, S: int, sequences: list[tuple[int, int]], device: torch.device) -> Visible:
    """Causal, over half of the `S` keys where windowed; of sequences (start, length) where packed."""
    packed = None
    if kind.packed:
        starts, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in zip(*sequences, strict=True))
        longest = max(length for _, length in sequences)
        packed = Packed(starts, lengths, starts, lengths, longest, longest)
    return Visible(left=S // 2 if kind.windowed else None, right=0, packed=packed)


def _check_order(device: torch.device, kind: Kind) -> None:
    """One query over many keys, many queries over few keys, in blocks of each kernel's own: in which order?"""
    width, few = kind.width, 2
    for kernel, over, names in (
        ("forward", "keys", ("y",)), ("dq", "keys", ("dq",)), ("dkdv", "queries", ("dk", "dv"))
    ):  # fmt: skip
        step = attentions.tile_of(kernel, max(16, power_of_two(width)), kind.dtype).step
        length = BLOCKS * step
        tells, want = _telling(length, step, width)
        zeros = torch.zeros(length, 1, 1, width, device="cpu")
        first, sign = zeros.clone(), 1 - 2 * (torch.arange(length, device="cpu") % 2).view(-1, 1, 1, 1).float()
        first[..., :1] = 1
        # dp is 1 or -1, and delta 0.
        if over == "keys":
            operands = [zeros[:1], tells, torch.cat([sign, tells[..., 1:]], -1), first[:1]]
        else:
            operands = [tells, zeros[:few], (first * sign)[:few], torch.cat([first[..., :1], tells[..., 1:]], -1)]
        q, k = len(operands[0]), len(operands[1])
        # All see all; a window is wide enough not to matter.
        visible = Visible(left=length if kind.windowed else None, right=length if kind.windowed else None)
        if kind.packed:
            edges = [torch.tensor([0, rows], device=device) for rows in (q, k)]
            visible = Visible(visible.left, visible.right, packed=Packed.of(*edges))
        found = dict(zip(NAMES, _results([x.to(device, kind.dtype) for x in operands], visible, 1.0), strict=True))
        for name in names:
            rows = found[name][:, 0, 0, 1:].cpu().float().abs()
            # A probability is one over the number of keys, and goes into all sums.
            if not torch.equal(rows, (want[1:] / k).expand_as(rows)):
                raise _error(kind, f"{name} is not added over {over} from position 0 on, {step} at a time")


def _telling(length: int, step: int, width: int) -> tuple[Tensor, Tensor]:
    """[length, 1, 1, width] whose columns, but for the first, tell an order; and what columns come to in ours."""
    tells, want = torch.zeros(length, 1, 1, width, device="cpu"), torch.zeros(width, device="cpu")
    choices = ((small, pair) for pair in combinations(range(BLOCKS), 2) for small in range(BLOCKS) if small not in pair)
    for column, (small, (plus, minus)) in zip(range(1, width), choices, strict=False):
        for block, value in ((plus, LARGE), (small, SMALL), (minus, -LARGE)):
            tells[block * step, ..., column] = value
        want[column] = SMALL if small > max(plus, minus) else 0.0
    return tells, want


Try = tuple[str, Callable[[], list[Tensor]], Callable[[list[Tensor]], list[Tensor]]]


def _neighbours(kind: Kind, qkvd: list[Tensor], visible: Visible) -> Iterator[Try]:
    """What is beside a head of a sequence, or after it, or before it on another rank."""
    q, k, v, dy = qkvd
    S, repeat = len(q), HEADS // GROUPS
    last = [q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], dy[:, :, -1:]]
    yield "all at once again", lambda: _results(qkvd, visible), lambda whole: whole
    yield "a head alone", lambda: _results(last, visible), lambda whole: [x[:, :, -1:] for x in whole]
    group = [q[:, 1:, -repeat:], k[:, 1:, -1:], v[:, 1:, -1:], dy[:, 1:, -repeat:]]
    of_group = lambda whole: [x[:, 1:, -repeat:] for x in whole]  # noqa: E731
    yield "a sequence's group of heads alone", lambda: _results(group, visible), of_group
    # Keys and queries after the end: nobody before them sees them, and their output has no gradient.
    longer = [torch.cat([x, x[: S // 3] * (i < 3)]) for i, x in enumerate(qkvd)]
    yield "a longer sequence", lambda: [x[:S] for x in _results(longer, visible)], lambda whole: whole
    start = S // 2 + 3
    chunk = Visible(visible.left, 0, offset=start)
    rows = [q[start:], k, v, dy[start:]]
    yield "a chunk of queries", lambda: _results(rows, chunk)[:2], lambda whole: [x[start:] for x in whole[:2]]


def _packed(kind: Kind, qkvd: list[Tensor], visible: Visible) -> Iterator[Try]:
    """A sequence between two others, and rows of padding."""
    S, device = len(qkvd[0]), qkvd[0].device
    yield "all at once again", lambda: _results(qkvd, visible), lambda whole: whole
    before, gap = S // 3 + 1, 2
    rows = [torch.cat([x[:before], x[:gap], x, x[: S // 2]]) for x in qkvd]
    table = _visible(kind, S, [(0, before), (before + gap, S), (before + gap + S, S // 2)], device)
    own = slice(before + gap, before + gap + S)
    yield "a sequence packed beside others", lambda: [x[own] for x in _results(rows, table)], lambda whole: whole


def _same_bits(kind: Kind, what: str, found: list[Tensor], expected: list[Tensor]) -> None:
    for name, x, y in zip(NAMES, found, expected, strict=False):
        whole = torch.int32 if x.dtype == torch.float32 else torch.int16
        if not torch.equal(x.contiguous().view(whole), y.contiguous().view(whole)):
            raise _error(kind, f"{name} of {what} has other bits")


def _check_values(kind: Kind, qkvd: list[Tensor], visible: Visible, y: Tensor) -> None:
    """Some rows of the last head of the first sequence."""
    S, scale, u = len(y), 0.3, 2.0**-24
    rows = torch.linspace(0, S - 1, 8, device="cpu").long()
    q_MD, k_TD, v_TD = (x[:, 0, -1].cpu().double() for x in qkvd[:3])
    q_MD, found = q_MD[rows], y[rows.to(y.device), 0, -1].cpu().double()
    key = torch.arange(S, device="cpu")
    hidden = (key > rows[:, None]) | (key < rows[:, None] - (S if visible.left is None else visible.left))
    scores = (q_MD @ k_TD.T * scale).masked_fill(hidden, -math.inf)
    P, x = scores.softmax(-1), (scores.amax(-1, keepdim=True) - scores).clamp(max=90)
    e = u if kind.dtype == torch.float32 else torch.finfo(kind.dtype).eps / 2
    error = 2 * u * (kind.width + 1) * scale * (q_MD.abs() @ k_TD.abs().T) + u * (3 * x + 8) + e
    error = error + (P * error).sum(-1, keepdim=True) + 2 * u * (S + 8)
    want = P @ v_TD
    bound = 2 * ((P * error) @ v_TD.abs() + e * want.abs())
    if kind.dtype == torch.float16:  # p below its smallest number
        bound += 2.0**-24 * v_TD.abs().sum(0)
    if not bool(((found - want).abs() <= bound).all()):
        raise _error(kind, f"y is off by {((found - want).abs() / bound).max():.1f} times its bound")


def _error(kind: Kind, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"attention of {kind} on this device does not keep the contract: {what} (Triton {triton.__version__}). "
        "Please report it, with the output of `make gpu`; attention='unfused' does without these kernels"
    )

"""The gradient of an embedding: every row sums over its own tokens, in token order.

    ids      7 2 7 9 2 7      sorted, ties in token order:   2 2 | 7 7 7 | 9
    tokens   0 1 2 3 4 5                                     1 4 | 0 2 5 | 3

A row's tokens are cut into chunks of CHUNK, each of which a program adds by pairs; the chunks of a frequent row, as of
padding, wait in a scratch buffer, and another launch adds CHUNK of them at a time by pairs, one such block after the
other. Other rows, on this rank or another, do not affect it. Legend: T tokens, H features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patches.order.kernels.pairs import LAUNCH, narrowed, on, pairs_of_rows, power_of_two, widened

__all__ = ["CHUNK", "embedding_gradient"]

CHUNK = 64
COLUMNS = 128


def embedding_gradient(dy_TH: Tensor, ids_T: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, H]: row i is Σ dy over the tokens whose id is i, in float32, rounded once to `dtype`.

    Args:
        ids_T: int64; those outside [0, rows) are left out.
    """
    dy_TH = dy_TH.contiguous()
    tokens, features = dy_TH.shape
    out = torch.zeros(rows, features, dtype=dtype, device=dy_TH.device)
    if not dy_TH.numel():
        return out
    sorted_T, order_T = ids_T.masked_fill((ids_T < 0) | (ids_T >= rows), rows).sort(stable=True)
    start_T, end_T = (torch.searchsorted(sorted_T, sorted_T, right=right) for right in (False, True))
    windows = -(-tokens // CHUNK)
    sums = torch.empty(2 * windows, features, dtype=torch.float32, device=dy_TH.device)
    columns = min(COLUMNS, power_of_two(features))
    parts = -(-features // columns)
    where = (sorted_T, start_T, end_T, out, sums, tokens, features, rows, parts)
    meta = {"CHUNK": CHUNK, "COLUMNS": columns, "num_warps": 8, **LAUNCH}
    with on(dy_TH):
        _chunks[(tokens * parts,)](dy_TH, order_T, *where, **meta)
        _frequent[(windows * parts,)](*where, **meta)
    return out


@triton.jit(do_not_specialize=["tokens", "rows", "parts"])
def _chunks(
    dy, order, ids, start, end, out, sums, tokens, features, rows, parts, CHUNK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A program for every place in the sorted tokens: it adds the chunk that starts there, or ends."""
    place = tl.program_id(0) // parts
    columns = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(ids + place)
    first = tl.load(start + place)
    last = tl.load(end + place)
    if ((place - first) % CHUNK == 0) & (row < rows):
        at = place + tl.arange(0, CHUNK)
        inside = at < last
        token = tl.load(order + at, mask=inside, other=0)
        both = inside[:, None] & (columns < features)[None, :]
        terms = widened(tl.load(dy + token[:, None] * features + columns[None, :], mask=both, other=0.0))
        total = pairs_of_rows(terms, CHUNK, COLUMNS)
        if last - first <= CHUNK:
            tl.store(out + row * features + columns, narrowed(total, out.dtype.element_ty), mask=columns < features)
        else:
            tl.store(sums + _slot(place, last, CHUNK) * features + columns, total, mask=columns < features)


@triton.jit(do_not_specialize=["tokens", "rows", "parts"])
def _frequent(
    ids, start, end, out, sums, tokens, features, rows, parts, CHUNK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A program for every CHUNK places: it adds the chunks of the row of several that starts there, or ends."""
    places = tl.program_id(0) // parts * CHUNK + tl.arange(0, CHUNK)
    columns = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(start + places, mask=places < tokens, other=-1)
    last = tl.load(end + places, mask=places < tokens, other=-1)
    begins = (first == places) & (last - first > CHUNK)
    place = tl.max(tl.where(begins, first, -1))
    until = tl.max(tl.where(begins, last, -1))
    row = tl.load(ids + place, mask=place >= 0, other=rows)
    if row < rows:
        total = tl.zeros([COLUMNS], tl.float32)
        while place < until:
            chunks = place + CHUNK * tl.arange(0, CHUNK)
            at = _slot(chunks, until, CHUNK)[:, None] * features + columns[None, :]
            both = (chunks < until)[:, None] & (columns < features)[None, :]
            total += pairs_of_rows(tl.load(sums + at, mask=both, other=0.0), CHUNK, COLUMNS)
            place += CHUNK * CHUNK
        tl.store(out + row * features + columns, narrowed(total, out.dtype.element_ty), mask=columns < features)


@triton.jit
def _slot(place, last, CHUNK: tl.constexpr):
    """Where the sum of a chunk waits: of those that start within CHUNK places, one is whole and one not, at most."""
    return place // CHUNK * 2 + (last - place < CHUNK)

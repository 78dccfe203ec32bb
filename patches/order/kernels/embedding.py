"""The gradient of an embedding: every row sums over its own tokens, in token order.

    ids      7 2 7 9 2 7      sorted, ties in token order:   2 2 | 7 7 7 | 9
    tokens   0 1 2 3 4 5                                     1 4 | 0 2 5 | 3

A program finds the start of a row's tokens, or ends. It adds them in blocks of BLOCK, each by pairs, one block
after the other. Other rows, on this rank or another, do not affect it. Legend: T tokens, H features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patches.order.kernels.pairs import LAUNCH, narrowed, on, pairs_of_rows, power_of_two, widened

__all__ = ["BLOCK", "embedding_gradient"]

BLOCK = 16
COLUMNS = 512


def embedding_gradient(dy_TH: Tensor, ids_T: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, H]: row i is Σ dy over the tokens whose id is i, in float32, rounded once to `dtype`.

    Args:
        ids_T: int64; those outside [0, rows) are left out.
    """
    dy_TH = dy_TH.contiguous()
    tokens, features = dy_TH.shape
    out = torch.zeros(rows, features, dtype=dtype, device=dy_TH.device)
    sorted_T, order_T = ids_T.masked_fill((ids_T < 0) | (ids_T >= rows), rows).sort(stable=True)
    columns = min(COLUMNS, power_of_two(features))
    parts = -(-features // columns)
    if dy_TH.numel():
        with on(dy_TH):
            _gradient[(tokens * parts,)](
                dy_TH, sorted_T, order_T, out, tokens, features, rows, parts,
                BLOCK=BLOCK, COLUMNS=columns, num_warps=8, **LAUNCH,
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens", "rows", "parts"])
def _gradient(dy, ids, order, out, tokens, features, rows, parts, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    first = tl.program_id(0) // parts
    columns = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if (row != before) & (row < rows):
        total = tl.zeros([COLUMNS], tl.float32)
        found = BLOCK
        while found == BLOCK:
            place = first + tl.arange(0, BLOCK)
            same = tl.load(ids + place, mask=place < tokens, other=-1) == row
            token = tl.load(order + place, mask=same, other=0)
            at = token[:, None] * features + columns[None, :]
            terms = widened(tl.load(dy + at, mask=same[:, None] & (columns < features)[None, :], other=0.0))
            total += pairs_of_rows(terms, BLOCK, COLUMNS)
            found = tl.sum(same.to(tl.int32))
            first += BLOCK
        at = out + row * features + columns
        tl.store(at, narrowed(total, out.dtype.element_ty), mask=columns < features)

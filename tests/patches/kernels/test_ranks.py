"""The sum over ranks in one pass: bit for bit `tree_sum`, whatever the number of ranks and wherever their parts lie."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.order.exact import rounded
from patches.order.kernels import ranks as kernels
from patches.order.kernels.ranks import BLOCK, MAX_PARTS, rounded_tree_sum, sum_of_peers
from patches.order.tree import tree_sum
from tests.patches.kernels.variants import of_ranks
from tests.support.bits import bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EDGES = (0.0, -0.0, -1e-45, 1e-40, -1e-41, 3e38, -3e38, math.inf, -math.inf, math.nan, 65504.0, 1.0)


def parts(ranks: int, size: int) -> Tensor:
    """Values over many magnitudes; every edge meets itself, an ordinary number and another edge."""
    g = torch.Generator().manual_seed(ranks)
    x = torch.randn(ranks, size, generator=g) * torch.randn(ranks, size, generator=g).mul(8).exp2()
    for i, edge in enumerate(EDGES[:size]):
        x[:, i] = edge
        if len(EDGES) * 2 < size:
            x[-1, len(EDGES) + i] = edge
    if size > 40:
        x[0, 30], x[-1, 30] = math.inf, -math.inf
        x[:, 31] = x[:, 31].abs() * -1e-42
    return x


def expected(x: Tensor, dtype: torch.dtype, divide_by: int) -> Tensor:
    root = tree_sum(x.cpu().unbind())
    return rounded(root / divide_by if divide_by > 1 else root, dtype)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", (1, 2, 3, 4, 5, 6, 7, 8, 12, MAX_PARTS, MAX_PARTS + 1, 6 * MAX_PARTS + 5))
def test_one_pass_has_the_bits_of_the_tree_sum(device, ranks, dtype):
    for size in (1, 7, BLOCK, 2 * BLOCK + 13):
        x = parts(ranks, size)
        for divide_by in (1, 3, ranks):
            got = rounded_tree_sum(x.to(device), dtype, divide_by).cpu()
            assert torch.equal(bits(got), bits(expected(x, dtype, divide_by))), f"{size=} {divide_by=}"


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("ranks", (2, 3, 8, MAX_PARTS))
def test_parts_read_through_addresses_give_the_same_bits(device, ranks):
    x = parts(ranks, 3 * BLOCK + 5)
    buffers = [part.to(device).clone() for part in x]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=device)
    for start, size in ((0, 3 * BLOCK + 5), (17, 2 * BLOCK), (BLOCK, 1)):
        want = expected(x[:, start : start + size], torch.bfloat16, 1)
        assert torch.equal(bits(sum_of_peers(addresses, start, size, torch.bfloat16).cpu()), bits(want))


@pytest.mark.parametrize("shape", ((8, 5), (12,), (4, 3, 7)))
def test_reading_peers_scatters_as_sending_does(device, shape, monkeypatch):
    """With peers that are buffers of this process, filled already; streams, where there are none, do nothing."""
    ranks = 4
    roots = [torch.randn(shape, generator=torch.Generator().manual_seed(rank)) for rank in range(ranks)]
    buffers = [torch.full((128,), math.nan, device=device) for _ in range(ranks)]
    barriers = []
    for root, buffer in zip(roots, buffers, strict=True):
        buffer[: root.numel()] = root.flatten().to(device)
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=device)
    handle = SimpleNamespace(barrier=lambda: barriers.append(buffers[2][: roots[2].numel()].cpu().clone()))
    monkeypatch.setattr(kernels, "_buffer", lambda group, count, device: (buffers[2], handle, addresses))
    if device.type == "cpu":
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(kernels, "check_symmetric_memory", lambda device: None)
        monkeypatch.setattr(kernels, "_aside", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    buffers[2].fill_(math.nan)  # this rank puts its own root there
    group = SimpleNamespace(size=lambda: ranks, rank=lambda: 2)
    got = kernels.begin_reading_peers(roots[2].to(device), group, torch.bfloat16).wait()
    want = rounded(tree_sum(roots), torch.bfloat16).chunk(ranks)[2]
    assert got.shape == want.shape and torch.equal(bits(got.cpu()), bits(want))
    assert len(barriers) == 2 and torch.equal(barriers[0], roots[2].flatten())


def test_nothing_is_summed_to_nothing(device):
    assert rounded_tree_sum(torch.empty(4, 0, device=device), torch.bfloat16).shape == (0,)


def test_uncovered_sums_are_refused(device):
    with pytest.raises(TypeError, match="float32 is summed and rounded to one of"):
        rounded_tree_sum(torch.ones(2, 4, device=device), torch.float64)
    with pytest.raises(ValueError, match=f"too many to read from at once: {MAX_PARTS} at most"):
        sum_of_peers(torch.zeros(MAX_PARTS + 1, dtype=torch.int64, device=device), 0, 4, torch.float32)


def test_variants_differ_and_have_names_of_their_own():
    found = list(of_ranks())
    assert len({variant.name for variant in found}) == len(found) == 16

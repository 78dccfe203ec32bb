"""Shards put together again are the tensor they were cut from, whatever the cut; distances are what they say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcheck.checkpoint.tiling import Tile, tiles
from tpcheck.trace.compare.logical import Logical
from tpcheck.trace.compare.metrics import Numbers, distance, numbers
from tpcheck.trace.record.noise import nudge, spawn
from tpcheck.trace.record.shards import Shards, whole


def assembled(held: list[Shards]) -> np.ndarray:
    """What a reader makes of the ranks' boxes."""
    shape = held[0].shape
    parts = [Tile(offset, part.numpy()) for shards in held for offset, part in shards.parts if part.numel()]
    known = tuple(
        max(part.offset[dim] + part.array.shape[dim] for part in parts) if extent is None else extent
        for dim, extent in enumerate(shape)
    )
    assert tiles(parts, known)
    answer = np.empty(known, parts[0].array.dtype)
    for offset, array in parts:
        answer[tuple(slice(low, low + size) for low, size in zip(offset, array.shape, strict=True))] = array
    return answer


@settings(max_examples=60, deadline=None)
@given(tp=st.sampled_from([1, 2, 4]), rows=st.integers(1, 3), columns=st.integers(1, 5), dim=st.integers(0, 1),
       every=st.integers(1, 3))  # fmt: skip
def test_cut_tensors_come_together(tp: int, rows: int, columns: int, dim: int, every: int) -> None:
    x = torch.arange(rows * tp * columns * tp).reshape(rows * tp, columns * tp)
    held = [whole(part).cut(dim, rank, tp, "").every(every) for rank, part in enumerate(x.chunk(tp, dim))]
    answer = assembled(held)
    longest = int(np.argmax(x.shape))
    sampled = x if answer.shape == x.shape else x[::every] if longest == 0 else x[:, ::every]
    assert (answer == sampled.numpy()).all()


@settings(max_examples=60, deadline=None)
@given(tp=st.sampled_from([1, 2, 4]), half=st.integers(1, 3), columns=st.integers(1, 4), dp=st.integers(1, 5))
def test_gated_tensors_in_flat_pieces_come_together(tp: int, half: int, columns: int, dp: int) -> None:
    gate, up = torch.arange(2 * half * tp * columns).reshape(2, half * tp, columns)
    held = []
    for rank in range(tp):
        local = torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
        edges = [local.numel() * piece // dp for piece in range(dp + 1)]
        shards = whole(local).gated(0, rank, tp)
        held += [shards.flattened(local.reshape(-1)[a:b], a) for a, b in itertools.pairwise(edges)]
    assert (assembled(held) == torch.cat([gate, up]).numpy()).all()


def test_microbatches_of_data_parallel_ranks_come_together() -> None:
    x = torch.arange(24).reshape(4, 6)
    held = [whole(x[:, index : index + 1]).batch(1, index) for index in range(6)]
    assert (assembled(held) == x.numpy()).all()


def _logical(x: torch.Tensor) -> Logical:
    size = x.element_size()
    bits = x.contiguous().view({2: torch.int16, 4: torch.int32}[size]).numpy().view(f"<u{size}")
    return Logical(str(x.dtype).removeprefix("torch."), bits, (), None, ())


def _numbers(a: Logical, b: Logical) -> Numbers:
    return numbers(a, b, distance(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_what_float64_says(dtype: torch.dtype) -> None:
    a = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    b = (a.double() * 1.01 + 0.001).to(dtype)
    found, x, y = _numbers(_logical(a), _logical(b)), a.double(), b.double()
    error = (x - y).abs()
    assert found.max_abs == pytest.approx(error.max().item())
    assert found.mean_abs == pytest.approx(error.mean().item())
    assert found.median_abs == pytest.approx(float(np.median(error.numpy())))
    assert found.over == pytest.approx([(error > level).double().mean().item() for level in (1e-4, 1e-3, 5e-3, 1e-2)])
    assert found.relative == pytest.approx(((x - y).norm() / x.norm()).item())
    assert found.cosine == pytest.approx(torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0).item())
    assert found.scale == pytest.approx(((x * y).sum() / (x * x).sum()).item())
    assert found.coherent_scale == pytest.approx(abs((y.norm() / x.norm()).log().item()))
    assert distance(_logical(a), _logical(b)).peak >= found.relative


def test_coherent_distance_is_large_where_a_factor_hides_below_rounding() -> None:
    a = torch.randn(200, 200, generator=torch.Generator().manual_seed(2)).bfloat16()
    rounding = distance(_logical(a), _logical(nudge(a, spawn(1, "here"))))
    factor = distance(_logical(a), _logical((a.double() * 0.995).bfloat16()))
    assert factor.overall < 2 * rounding.overall
    assert rounding.coherent < 3 * rounding.overall / a.numel() ** 0.5
    assert factor.coherent == pytest.approx(0.005, rel=0.2)
    assert factor.coherent > 50 * rounding.coherent


def test_numbers_of_equal_zero_and_nan_tensors() -> None:
    zeros, ones = _logical(torch.zeros(3, 4)), _logical(torch.ones(3, 4))
    assert _numbers(zeros, zeros).relative == 0
    assert _numbers(zeros, zeros).cosine == 1
    assert _numbers(zeros, ones).relative == float("inf")
    broken = torch.ones(3, 4)
    broken[1, 1] = float("nan")
    assert _numbers(ones, _logical(broken)).nan == 1


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2.0**-7), (torch.float32, 4 * 2.0**-23)])
def test_nudges_are_one_rounding_large_unbiased_and_repeatable(dtype: torch.dtype, most: float) -> None:
    x = torch.randn(200, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0] = 0
    x[1] = float("inf")
    y = nudge(x, spawn(1, "here"))
    assert torch.equal(y, nudge(x, spawn(1, "here")))
    assert not torch.equal(y, nudge(x, spawn(2, "here")))
    assert torch.equal(x[:2], y[:2])
    relative = (y[2:].double() / x[2:].double()) - 1
    assert relative.abs().max() <= most * 1.001
    assert relative.mean().abs() < most / 100

"""Differences of tensors, element by element, in every dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.bits import raw
from tpcheck.checkpoint import ulp
from tpcheck.checkpoint.ulp import Difference, compare

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int32, torch.int64, torch.uint64]


def difference(x: torch.Tensor, y: torch.Tensor) -> Difference:
    return compare(iter([memoryview(raw(x))]), iter([memoryview(raw(y))]), str(x.dtype).removeprefix("torch."))


def cut(data: bytes, edges: list[int]) -> Iterator[memoryview]:
    view = memoryview(data)
    for low, high in zip([0, *edges], [*edges, len(data)], strict=True):
        yield view[low:high]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_float_and_the_next_are_one_ulp_apart_everywhere(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.tensor(
        [1.0, -1.0, 2.0 - torch.finfo(dtype).eps, tiny, tiny / 2, 0.0, torch.finfo(dtype).max], dtype=dtype
    )
    bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    for index in range(len(values)):
        beyond = bits.clone()
        beyond[index] += 1
        other = beyond.view(dtype)
        found = difference(values, other)
        assert found == Difference(1, 0, abs(float(values[index]) - float(other[index])), 1)
        assert difference(other, values) == found


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_two_zeros_are_different_bits_but_no_ulp_apart(dtype: torch.dtype) -> None:
    assert difference(torch.tensor([0.0], dtype=dtype), torch.tensor([-0.0], dtype=dtype)) == Difference(1, 0, 0.0, 0)


def test_ulps_are_counted_across_zero_and_to_infinity() -> None:
    assert difference(torch.tensor([-1e-45]), torch.tensor([1e-45])).max_ulp == 2
    found = difference(torch.tensor([-math.inf], dtype=torch.float64), torch.tensor([math.inf], dtype=torch.float64))
    assert found == Difference(1, 0, math.inf, 2 * 0x7FF0000000000000)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_is_counted_apart(dtype: torch.dtype) -> None:
    x = torch.tensor([math.nan, 1.0, math.nan, 2.0], dtype=dtype)
    y = torch.tensor([math.nan, math.nan, 1.0, 3.0], dtype=dtype)
    assert difference(x, y) == Difference(3, 2, 1.0, int(0.5 / torch.finfo(dtype).eps))
    assert difference(x[:3], y[:3]) == Difference(2, 2, None, None)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_have_a_distance_but_no_ulps(dtype: torch.dtype) -> None:
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    x, y = torch.tensor([low, 1, 0], dtype=dtype), torch.tensor([high, 1, 1], dtype=dtype)
    assert difference(x, y) == Difference(2, 0, float(high - low), None)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.complex128], ids=str)
def test_of_other_dtypes_the_differing_elements_are_counted(dtype: torch.dtype) -> None:
    x, y = torch.tensor([1.0, 2.0, 3.0]).to(dtype), torch.tensor([1.0, 4.0, 3.0]).to(dtype)
    assert difference(x, y) == Difference(1, 0, None, None)


@given(st.data(), st.integers(1, 40))
def test_it_does_not_matter_how_the_streams_are_cut(data: st.DataObject, piece: int) -> None:
    numbers = st.lists(st.floats(width=32), min_size=8, max_size=8)
    x, y = (torch.tensor(data.draw(numbers)) for _ in range(2))
    edges = st.lists(st.integers(0, 8).map(lambda element: 4 * element), max_size=4).map(sorted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ulp, "PIECE", 4 * piece)
        found = compare(cut(raw(x), data.draw(edges)), cut(raw(y), data.draw(edges)), "float32")
    assert found == difference(x, y)
    assert (found.differing, found.nan, found.max_abs) == _expected(x, y)


def test_streams_of_different_length_are_never_called_equal() -> None:
    with pytest.raises(ValueError, match="not equally long"):
        compare(cut(b"abcd", []), cut(b"abc", [1]), "uint8")


def _expected(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, ...]:
    pairs = [(p, q) for p, q, same in zip(x, y, x.view(torch.int32) == y.view(torch.int32), strict=True) if not same]
    numbers = [(float(p), float(q)) for p, q in pairs if not (p.isnan() or q.isnan())]
    return len(pairs), len(pairs) - len(numbers), max((_distance(p, q) for p, q in numbers), default=None)


def _distance(x: float, y: float) -> float:
    return float(abs(Fraction(x) - Fraction(y))) if math.isfinite(x) and math.isfinite(y) else abs(x - y)

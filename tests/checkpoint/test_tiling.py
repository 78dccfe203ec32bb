"""A tensor cut into boxes is the same tensor, however it is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.checkpoint import tiling
from tpcheck.checkpoint.tiling import Array, Index, Tile, boxes_of_range, row_major, tiles

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[Array, list[Tile]]:
    """A tensor, and parts of it that come from cutting a box in two again and again, at any place, shuffled."""
    shape = draw(shapes)
    tensor = np.arange(math.prod(shape), dtype=draw(st.sampled_from(["u1", "u2", "u4", "u8"]))).reshape(shape)
    cut = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        index, dim = draw(st.integers(0, len(cut) - 1)), draw(st.integers(0, len(shape) - 1))
        offset, size = cut[index]
        if size[dim] > 1:
            at = draw(st.integers(1, size[dim] - 1))
            cut[index] = offset, _with(size, dim, at)
            cut.append((_with(offset, dim, offset[dim] + at), _with(size, dim, size[dim] - at)))
    parts = [Tile(offset, _box(tensor, offset, size, draw(st.booleans()))) for offset, size in cut]
    return tensor, draw(st.permutations(parts))


@pytest.mark.parametrize("block", [1, 7, 16, 1 << 20])
@given(cut_tensors())
def test_row_major_gives_the_tensor_back_however_it_is_cut(block: int, case: tuple[Array, list[Tile]]) -> None:
    tensor, parts = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "BLOCK", block)
        assert tiles(parts, tensor.shape)
        assert b"".join(array.tobytes() for array in row_major(parts)) == tensor.tobytes()


@given(cut_tensors(), st.data())
def test_a_missing_doubled_moved_or_shrunk_part_does_not_tile(
    case: tuple[Array, list[Tile]], data: st.DataObject
) -> None:
    tensor, parts = case
    victim = data.draw(st.integers(0, len(parts) - 1))
    part, others = parts[victim], parts[:victim] + parts[victim + 1 :]
    assert not tiles(others, tensor.shape)
    assert not tiles([*parts, part], tensor.shape)
    if tensor.ndim:
        dim = data.draw(st.integers(0, tensor.ndim - 1))
        assert not tiles([*others, Tile(_with(part.offset, dim, part.offset[dim] + 1), part.array)], tensor.shape)
        assert not tiles(
            [*others, Tile(part.offset, part.array.take(range(part.array.shape[dim] - 1), dim))], tensor.shape
        )


def test_nothing_is_copied_when_the_first_dimension_is_cut() -> None:
    tensor = np.arange(24).reshape(6, 4)
    blocks = list(row_major([Tile((3, 0), tensor[3:]), Tile((0, 0), tensor[:3])]))
    assert [np.shares_memory(block, tensor) for block in blocks] == [True, True]


@given(shapes, st.data())
def test_boxes_of_a_flat_range_hold_its_elements_in_order(shape: Index, data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    tensor = np.arange(size).reshape(shape)
    found = [_box(tensor, *box, contiguous=True).reshape(-1) for box in boxes_of_range(shape, start, stop)]
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert np.concatenate([np.arange(0), *found]).tolist() == list(range(start, stop))


def _box(tensor: Array, offset: Index, size: Index, contiguous: bool) -> Array:
    box = tensor[tuple(slice(low, low + length) for low, length in zip(offset, size, strict=True))].reshape(size)
    return np.ascontiguousarray(box).reshape(size) if contiguous else box


def _with(index: Index, dim: int, value: int) -> Index:
    return (*index[:dim], value, *index[dim + 1 :])


def test_strided_parts_are_read_in_logical_order() -> None:
    tensor = np.arange(24, dtype="u4").reshape(4, 6)
    assert _bytes(row_major([Tile((0, 0), tensor.T)])) == tensor.T.tobytes()


def _bytes(arrays: Iterator[Array]) -> bytes:
    return b"".join(array.tobytes() for array in arrays)

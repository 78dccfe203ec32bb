"""Pickles and torch.save archives are read right, and nothing in them runs."""

from __future__ import annotations

import argparse
import contextlib
import enum
import io
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.bits import raw
from tests.support.pickles import Exec, SetState, Shell, Touch
from tpcheck.checkpoint.unpickle import ITEMSIZE, Inert, Stored, load_archive, load_pickle
from tpcheck.errors import TpcheckError

DTYPES = [getattr(torch, name) for name in ITEMSIZE if hasattr(torch, name)]


class Colour(enum.Enum):
    RED = 1


def saved(value: Any) -> memoryview:
    file = io.BytesIO()
    torch.save(value, file)
    return memoryview(file.getvalue())


def read(view: memoryview, stored: Stored) -> bytes:
    size = ITEMSIZE[stored.dtype]
    strides = [stride * size for stride in stored.strides]
    return np.ndarray(stored.shape, f"V{size}", view, stored.position, strides).tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_every_dtype_is_found_in_its_archive(dtype: torch.dtype) -> None:
    tensor = torch.arange(60, dtype=torch.uint8).repeat(16).view(dtype if dtype != torch.bool else torch.uint8)
    tensor = (tensor % 2).bool() if dtype == torch.bool else tensor
    view = saved(tensor)
    stored = load_archive(view, "x")
    assert stored.dtype == str(dtype).removeprefix("torch.")
    assert read(view, stored) == raw(tensor)


@given(st.permutations(range(3)), st.integers(0, 2), st.integers(1, 3), st.booleans())
def test_views_are_read_with_their_strides_and_offset(order: list[int], start: int, step: int, flag: bool) -> None:
    tensor = torch.arange(120, dtype=torch.int32).reshape(4, 5, 6).permute(*order)[start::step]
    tensor = torch.nn.Parameter(tensor.float()) if flag else tensor
    view = saved(tensor)
    assert read(view, load_archive(view, "x")) == raw(tensor.detach())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_scalars_and_empty_tensors_are_tensors(shape: tuple[int, ...]) -> None:
    view = saved(torch.ones(shape))
    stored = load_archive(view, "x")
    assert stored.shape == shape
    assert read(view, stored) == raw(torch.ones(shape))


def test_a_conjugate_view_is_refused() -> None:
    with pytest.raises(TpcheckError, match="conjugated"):
        load_archive(saved(torch.ones(2, dtype=torch.complex64).conj()), "x")


def test_ordinary_structures_are_kept_and_foreign_objects_are_inert() -> None:
    value = {
        "list": [1, 2.5, None, "x", (1,), {2}],
        "ordered": OrderedDict(a=1),
        "size": torch.Size([2, 3]),
        "args": argparse.Namespace(lr=0.1, colour=Colour.RED),
        "default": defaultdict(list, a=[1]),
        "dtype": torch.bfloat16,
    }
    found = load_pickle(pickle.dumps(value), "x")
    assert found["list"] == value["list"]
    assert found["ordered"] == {"a": 1}
    assert found["size"] == (2, 3)
    assert isinstance(found["args"], Inert)
    assert found["args"].get("lr") == 0.1
    assert found["args"].args == () and found["args"].items == []  # though made without a call
    assert found["default"].items == [("a", [1])]
    assert found["dtype"].qualname == "torch.bfloat16"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("attack", [Touch, Shell, Exec, SetState])
def test_nothing_in_a_pickle_runs(attack: type[Touch], protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    data = pickle.dumps({"x": attack(marker)}, protocol)
    assert isinstance(load_pickle(data, "x")["x"], Inert)
    view = saved([attack(marker), torch.ones(2)])
    assert isinstance(load_archive(view, "x")[1], Stored)
    assert not marker.exists()


def test_the_attacks_would_work_on_an_ordinary_unpickler(tmp_path: Path) -> None:
    for attack in (Touch, Shell, Exec):
        marker = tmp_path / attack.__name__
        pickle.loads(pickle.dumps(attack(marker)))
        assert marker.exists()


@pytest.mark.parametrize(
    ("old", "new"), [(b"K@\x85", b"K\x7f\x85"), (b"K\x01\x85", b"K\x02\x85")], ids=["shape", "stride"]
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(old: bytes, new: bytes) -> None:
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(torch.arange(64.0)))) as good, zipfile.ZipFile(changed, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name).replace(old, new))
    with pytest.raises(TpcheckError, match="beyond its storage"):
        load_archive(memoryview(changed.getvalue()), "x")


@given(st.data())
def test_a_damaged_archive_is_read_or_refused_but_never_crashes(data: st.DataObject) -> None:
    good = bytes(saved({"a": torch.arange(8.0), "b": [1, "x"]}))
    at = data.draw(st.integers(0, len(good) - 1))
    broken = data.draw(
        st.sampled_from([good[:at], good[at:], good[:at] + b"\xff" + good[at + 1 :], good[:at] + good[at + 1 :]])
    )
    with contextlib.suppress(TpcheckError):
        load_archive(memoryview(broken), "x")


def test_a_tuple_that_stands_for_more_than_the_file_holds_is_refused() -> None:
    nested: Any = ()
    for _ in range(40):
        nested = (nested, nested)
    with pytest.raises(TpcheckError, match="a tuple of more than"):
        load_pickle(pickle.dumps(nested), "x")
    # As a key it would be hashed while it is read.
    key = pickle.dumps(nested).removesuffix(pickle.STOP)
    with pytest.raises(TpcheckError, match="a tuple of more than"):
        load_pickle(pickle.EMPTY_DICT + key + pickle.NONE + pickle.SETITEM + pickle.STOP, "x")


def test_no_pickle_changes_what_the_next_one_is_read_with() -> None:
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    state = pickle.dumps((None, {"__defaults__": ()})).removesuffix(pickle.STOP)
    with pytest.raises(TpcheckError, match="changes a function"):
        load_pickle(function + state + pickle.BUILD + pickle.STOP, "x")
    assert isinstance(load_archive(saved(torch.ones(2)), "x"), Stored)


def test_what_a_pickle_wants_to_be_imported_is_told(tmp_path: Path) -> None:
    names: set[str] = set()
    load_pickle(pickle.dumps([OrderedDict(), Shell(tmp_path / "x")]), "x", names)
    assert names == {"collections.OrderedDict", "posix.system"}


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_tensor_is_seen(at: float, bit: int) -> None:
    tensor = torch.arange(1000.0)
    whole = bytearray(saved({"a": tensor}))
    start = bytes(whole).index(raw(tensor))
    whole[start + int(at * 4000)] ^= 1 << bit
    with pytest.raises(TpcheckError, match="not those that were written"):
        load_archive(memoryview(bytes(whole)), "x")


def test_an_archive_without_checksums_is_read() -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        view = saved(torch.arange(5))
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_archive(view, "x").shape == (5,)


def test_what_grows_when_it_is_unpacked_is_refused() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", pickle.dumps(b"0" * (1 << 24)))
    with pytest.raises(TpcheckError, match="is compressed"):
        load_archive(memoryview(packed.getvalue()), "x")


def test_a_list_nested_beyond_any_stack_is_read(tmp_path: Path) -> None:
    deep = pickle.EMPTY_LIST * 100_000 + pickle.APPEND * 99_999 + pickle.STOP
    assert isinstance(load_pickle(deep, "x"), list)

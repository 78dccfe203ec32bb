"""Tensors of other shapes in B than in A: read as the shards that they are, said, and the rest compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tpcheck.trace.compare.command import compare
from tpcheck.trace.compare.logical import Key, Logical
from tpcheck.trace.compare.reader import Trace
from tpcheck.trace.record.shards import Shards, whole
from tpcheck.trace.record.store import Writer, rank_folder

Record = tuple[str, str, Shards, dict[str, Any]]
BIAS, WEIGHT = torch.arange(8.0) + 1, torch.arange(32.0).view(4, 8) + 1


def written(path: Path, *ranks: Sequence[Record], megatron: bool = True) -> Path:
    """A trace of one step, of tensor-parallel ranks."""
    for rank, records in enumerate(ranks):
        place = {"rank": rank, "world": len(ranks), "tp_rank": rank, "tp": len(ranks), "dp_rank": 0, "dp": 1}
        asked = {"dtype": "float32", "sample": 1, "perturb": 0, "megatron": megatron}
        writer = Writer(rank_folder(path, rank), {**place, **asked})
        for kind, name, shards, more in records:
            writer.add({"kind": kind, "name": name, "step": 0, **more}, shards)
        writer.close({"steps": [0]})
    return path


def parameter(name: str, shards: Shards) -> list[Record]:
    return [("start", name, shards, {}), ("grad", name, shards, {})]


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return written(tmp_path / "a", [*parameter("bias", whole(BIAS)), *parameter("weight", whole(WEIGHT))])


def halves(tensor: torch.Tensor, dim: int, rank: int) -> Shards:
    return whole(tensor.chunk(2, dim)[rank])


@pytest.mark.parametrize("megatron", [True, False])
def test_a_parameter_that_nobody_marked_as_cut_is_put_side_by_side(a: Path, tmp_path: Path, megatron: bool) -> None:
    ranks = [
        [
            *parameter("bias", halves(BIAS, 0, rank)),
            *parameter("weight", whole(WEIGHT.chunk(2, 1)[rank]).cut(1, rank, 2, "row")),
        ]
        for rank in range(2)
    ]
    found = compare(a, written(tmp_path / "b", *ranks, megatron=megatron))
    rows = {(row.key.kind, row.key.name): row for row in found.rows}
    assert (
        rows["grad", "bias"].verdict == rows["start", "bias"].verdict == rows["grad", "weight"].verdict == "identical"
    )
    assert not found.unmapped
    if not megatron:
        assert found.verdict == "identical"  # nobody marks anything there
        return
    assert found.first is not None and (found.first.key.kind, found.first.key.name) == ("settings", "sharded bias")
    assert "hold parts of it along dimension 0, and it is not marked so" in found.first.why


def test_a_whole_parameter_that_is_marked_as_cut_is_laid_over_itself(a: Path, tmp_path: Path) -> None:
    ranks = [
        [*parameter("bias", whole(BIAS).cut(0, rank, 2, "column")), *parameter("weight", whole(WEIGHT))]
        for rank in range(2)
    ]
    found = compare(a, written(tmp_path / "b", *ranks))
    assert found.first is not None and "marked as cut along dimension 0" in found.first.why
    assert {row.verdict for row in found.rows if row.key.kind == "grad"} == {"identical"}


def test_one_odd_parameter_is_a_finding_and_ends_nothing(a: Path, tmp_path: Path) -> None:
    odd = [*parameter("bias", whole(torch.ones(5))), *parameter("weight", whole(WEIGHT))]
    found = compare(a, written(tmp_path / "b", odd))
    assert found.first is not None and found.first.why == "of another shape: [8] in A, [5] in B"
    assert {row.verdict for row in found.rows if row.key.name == "weight"} == {"identical"}


def output(tensor: torch.Tensor, number: int) -> Record:
    return ("out", "layer", whole(tensor).batch(0, number), {"microbatch": number})


def test_microbatches_of_unequal_size_lie_in_a_row(tmp_path: Path) -> None:
    samples = torch.randn(4, 3)
    three_and_one = Trace(written(tmp_path / "b", [output(samples[:3], 0), output(samples[3:], 1)]))
    found = three_and_one.logical(Key(0, "out", "layer"))
    assert isinstance(found, Logical)
    assert torch.equal(torch.from_numpy(found.values()).float(), samples)


def test_microbatches_of_other_lengths_are_tensors_by_themselves(tmp_path: Path) -> None:
    trace = Trace(written(tmp_path / "b", [output(torch.randn(2, 5), 0), output(torch.randn(2, 4), 1)]))
    assert [key.name for key in trace.order] == ["layer@0", "layer@1"]
    assert all(isinstance(trace.logical(key), Logical) for key in trace.order)


def test_a_loss_is_the_sum_of_the_microbatches(tmp_path: Path) -> None:
    ones = [
        ("loss", "model", whole(torch.tensor([x])).batch(0, n), {"microbatch": n}) for n, x in enumerate((1.0, 2.5))
    ]
    found = Trace(written(tmp_path / "b", ones)).logical(Key(0, "loss", "model"))
    assert isinstance(found, Logical) and found.values().tolist() == [3.5]

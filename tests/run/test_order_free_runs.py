"""Whole runs with `batch: order-free`: one digest at any layout, also of a run that changes it on the way."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.support.finished import finish, sweep
from tests.support.small_run import train
from tests.support.traces import BASE, Runs
from tpcheck.cli import main
from tpcheck.config.load import parse_run
from tpcheck.errors import TpcheckError
from tpcheck.sweep.spec import load_sweep
from tpcheck.sweep.verdict import judge

FREE = ("batch=order-free", "model.num_layers=2", "global_batch_size=8")


def test_a_run_resumed_at_other_layouts_ends_in_the_digest_of_an_uninterrupted_one(tmp_path: Path) -> None:
    steps = (*FREE, "steps=20")
    whole = train(tmp_path, "whole", *steps)
    train(tmp_path, "pieces", *steps, "tp=2", "dp=2", "stop_after=10")
    train(tmp_path, "pieces", *steps, "pp=2", "micro_batch_size=4", "stop_after=15", resume=True)
    pieces = train(tmp_path, "pieces", *steps, "dp=4", resume=True)
    assert pieces == whole
    assert main(["diff", str(tmp_path / "whole"), str(tmp_path / "pieces")]) == 0


@pytest.mark.parametrize("strategy", ("tree", "gather"))
def test_digests_are_one_over_all_axes(tmp_path: Path, strategy: str) -> None:
    settings = (*FREE, f"strategy={strategy}", "steps=3", "model.tied=true", "global_batch_size=12")
    one = train(tmp_path, "one", *settings, "micro_batch_size=1")
    assert one["model"] and one["optimizer"]
    for number, layout in enumerate((
        ("tp=2", "pp=2", "sequence_parallel=true", "micro_batch_size=3"),
        ("dp=3", "distributed_optimizer=true", "gradient_accumulation_fusion=true"),
    )):  # fmt: skip
        assert train(tmp_path, f"layout{number}", *settings, *layout) == one


CHUNKS = (*FREE, "chunks=8")


def test_a_run_resumed_at_other_context_parallel_sizes_ends_in_the_digest_of_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    steps = (*CHUNKS, "steps=6", "model.tied=true")
    whole = train(tmp_path, "whole", *steps)
    train(tmp_path, "pieces", *steps, "cp=2", "tp=2", "sequence_parallel=true", "stop_after=2")
    train(tmp_path, "pieces", *steps, "pp=2", "micro_batch_size=4", "stop_after=3", resume=True)
    train(tmp_path, "pieces", *steps, "cp=4", "distributed_optimizer=true", "stop_after=5", resume=True)
    assert train(tmp_path, "pieces", *steps, "dp=2", "cp=2", resume=True) == whole
    assert main(["diff", str(tmp_path / "whole"), str(tmp_path / "pieces")]) == 0


def test_a_run_does_not_go_on_with_other_chunks(tmp_path: Path, capfd: Any) -> None:
    train(tmp_path, "run", *CHUNKS, "steps=2", "stop_after=1")
    with pytest.raises(AssertionError):
        train(tmp_path, "run", *FREE, "chunks=4", "steps=2", resume=True)
    assert "was trained with chunks=8, not 4" in capfd.readouterr().err


def test_context_parallelism_is_an_axis_where_the_batch_has_no_order(tmp_path: Path) -> None:
    loaded = sweep(tmp_path, base={**BASE, "batch": "order-free", "chunks": 4},
                   matrix={"strategy": ["tree"], "cp": [1, 2]}, layouts=[{"tp": 1}, {"tp": 2}])  # fmt: skip
    assert [cell.variant for cell in loaded.cells] == ["CP=1 TP=1", "CP=1 TP=2", "CP=2 TP=1", "CP=2 TP=2"]
    assert [name for name, _ in loaded.groups()] == ["tree"] and loaded.cells[3].config.world_size == 4
    for cell in loaded.cells:
        finish(cell)
    assert judge(loaded).exit_code == 0
    chunks = sweep(tmp_path, base={**BASE, "batch": "order-free"}, matrix={"strategy": ["tree"], "chunks": [1, 4]})
    assert [name for name, _ in chunks.groups()] == ["tree-chunks1", "tree-chunks4"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cp": 2, "batch": None}, "cp=2 is for sums without an order: use batch=order-free with chunks=4, or cp=1"),
        ({"chunks": 4, "batch": None}, "chunks=4 is for sums without an order: use batch=order-free .* or chunks=1"),
        ({"cp": 2, "batch": None, "strategy": "stock"}, "cp=2 is for sums without an order"),
        ({"cp": 2}, "cp=2 needs chunks to be a multiple of 4, it is 1: set it so at every cp"),
        ({"cp": 3, "chunks": 8}, "cp=3 needs chunks to be a multiple of 6"),
        ({"chunks": 6}, "chunks=6 is not a power of two"),
        ({"chunks": 32, "seq_length": 24}, "chunks=32 does not divide seq_length=24"),
        ({"cp": 2, "chunks": 4, "attention": "unfused"}, "chunks=4 takes attention=blockwise, not unfused"),
        ({"cp": 2, "chunks": 4, "trace": {"steps": [0]}}, "trace records whole sequences, not what cp=2 ranks have"),
        ({"cp": 2, "chunks": 4, "tp": 8, "sequence_parallel": True, "seq_length": 24}, "tp=8 .* seq_length / cp=12"),
    ],
)
def test_layouts_of_chunks_that_cannot_be_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TpcheckError, match=message) as error:
        parse_run({**BASE, "strategy": "tree", "batch": "order-free", **settings})
    assert "\n" not in str(error.value)


def test_a_run_does_not_go_on_with_sums_of_the_other_kind(tmp_path: Path, capfd: Any) -> None:
    train(tmp_path, "run", "steps=2", "stop_after=1")
    with pytest.raises(AssertionError):
        train(tmp_path, "run", "steps=2", "batch=order-free", resume=True)
    assert "was trained with batch=None, not order-free" in capfd.readouterr().err


def test_traces_are_identical_at_every_layout(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    settings = {"strategy": "tree", "batch": "order-free", "global_batch_size": 4}
    found = runs.judge({"tp": 2, "dp": 2, "micro_batch_size": 1}, contextlib.nullcontext(), **settings)
    # A micro-batch's own loss is a float32 sum, and the trace adds those up.
    assert {row.verdict for row in found.rows if row.key.kind != "loss"} == {"identical"} and not found.unmapped


def test_data_parallelism_and_micro_batches_are_axes_where_the_batch_has_no_order(tmp_path: Path) -> None:
    matrix = {"batch": ["order-free"], "strategy": ["tree"]}
    layouts = [{"tp": 1}, {"dp": 2, "micro_batch_size": 1}, {"pp": 2, "micro_batch_size": 4}]
    loaded = sweep(tmp_path, matrix=matrix, layouts=layouts)
    assert [cell.variant for cell in loaded.cells] == ["TP=1", "DP=2 MB=1", "PP=2 MB=4"]
    assert [name for name, _ in loaded.groups()] == ["order-free-tree"]
    for cell in loaded.cells:
        finish(cell)
    assert judge(loaded).sentence().endswith("over TP=1; DP=2 MB=1; PP=2 MB=4")


def test_they_are_none_where_it_has_one(tmp_path: Path) -> None:
    loaded = sweep(tmp_path, matrix={"strategy": ["tree"]}, layouts=[{"dp": 1}, {"dp": 2}])
    assert [name for name, _ in loaded.groups()] == ["tree-dp1", "tree-dp2"]


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        ([{"strategy": "tree"}], "strategy is in the matrix already"),
        ([{"output": "x"}], "output cannot be in a layout"),
        ([], "layouts is empty"),
    ],
)
def test_layouts_that_cannot_be_are_refused(tmp_path: Path, layouts: list[Any], message: str) -> None:
    with pytest.raises(TpcheckError, match=message):
        sweep(tmp_path, matrix={"strategy": ["tree"]}, layouts=layouts)


def test_a_key_of_layouts_cannot_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("name: x\nbase: {model: qwen3-tiny}\nmatrix: {strategy: [tree]}\nlayouts: [{tp: 1}, {tp: 2}]\n")
    with pytest.raises(TpcheckError, match="tp=4: tp is what the matrix"):
        load_sweep(path, ["tp=4"])


def test_stock_runs_have_no_sums_without_an_order() -> None:
    with pytest.raises(TpcheckError, match="batch=order-free is the patches'"):
        parse_run({**BASE, "batch": "order-free"})

"""Whole runs whose model is cut into pipeline stages: the bits, checkpoints and verdict of runs that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.finished import finish, sweep
from tpcheck.config.load import parse_run
from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.run.launch import launch
from tpcheck.sweep.verdict import judge

TINY = {"preset": "qwen3-tiny", "num_layers": 4, "hidden_size": 32, "head_dim": 4, "ffn_hidden_size": 40, "tied": False}
GPT2 = {"preset": "gpt2-124m", "num_layers": 2, "hidden_size": 32, "head_dim": 4, "ffn_hidden_size": 40}
GPT2 |= {"num_attention_heads": 8, "num_query_groups": 8, "vocab_size": 300, "max_positions": 32}
SETTINGS = {"model": TINY, "seq_length": 16, "micro_batch_size": 1, "steps": 2}

LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": {"pp": 2},
    "pp4": {"pp": 4},
    "vpp2": {"pp": 2, "vpp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "vpp2-sharded": {"pp": 2, "vpp": 2, "distributed_optimizer": True},
}


def run(output: Path, **settings: Any) -> RunConfig:
    return parse_run({**SETTINGS, "output": str(output), **settings})


def train(output: Path, resume: bool = False, **settings: Any) -> Path:
    assert launch(run(output, **settings), resume) == 0
    return output


def outcome(output: Path) -> tuple[str, str, list[tuple[str, str]]]:
    """Digests, and every step's loss and gradient norm."""
    digests = result_dir.read_digests(output)
    assert digests is not None
    steps = [(row["loss_hex"], row["grad_norm_hex"]) for row in result_dir.read_steps(output)]
    return digests["model"], digests["optimizer"], steps


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on a single rank that the others must equal."""
    return train(tmp_path_factory.mktemp("one") / "run")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_has_the_bits_of_a_single_rank_at_any_number_of_stages(one: Path, tmp_path: Path, layout: str) -> None:
    assert outcome(train(tmp_path / layout, **LAYOUTS[layout])) == outcome(one)


def test_data_parallel_run_has_the_same_bits_at_any_number_of_stages(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", dp=2)
    stages = train(tmp_path / "stages", dp=2, pp=2, vpp=2, distributed_optimizer=True)
    assert outcome(stages) == outcome(whole)


def test_run_goes_on_at_other_numbers_of_stages_with_the_bits_of_an_uninterrupted_one(
    one: Path, tmp_path: Path
) -> None:
    layouts: list[dict[str, Any]] = [{"pp": 2, "vpp": 2}, {"tp": 2}, {"pp": 4}]
    whole = train(tmp_path / "whole", steps=4)
    for step, layout in enumerate(layouts, 1):
        train(tmp_path / "parts", resume=True, steps=4, stop_after=step, **layout)
    train(tmp_path / "parts", resume=True, steps=4, pp=2, vpp=2, distributed_optimizer=True)
    assert outcome(tmp_path / "parts") == outcome(whole)


def test_stock_run_begins_with_the_same_weights_at_any_number_of_stages(tmp_path: Path) -> None:
    """Without clipping, whose norm is summed over stages, its steps are those of a single rank, tied or not."""
    same = {"strategy": "stock", "dtype": "fp32", "model": {**GPT2, "tied": False}, "optimizer": {"clip_grad": 0.0}}
    whole, stages = train(tmp_path / "whole", **same), train(tmp_path / "stages", pp=2, **same)
    assert outcome(whole)[0] == outcome(stages)[0]


def test_stock_run_with_tied_embeddings_keeps_both_copies_equal(tmp_path: Path) -> None:
    tied = {"strategy": "stock", "dtype": "fp32", "model": {**GPT2, "tied": True}}
    whole, stages = train(tmp_path / "whole", **tied), train(tmp_path / "stages", pp=2, **tied)
    losses = [[row["loss"] for row in result_dir.read_steps(path)] for path in (whole, stages)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_stock_run_with_tied_embeddings_is_built_in_virtual_stages(tmp_path: Path) -> None:
    """Megatron has each copy wait for the other's first values, for ever where the other's rank waits for a seed."""
    tied = {"strategy": "stock", "dtype": "fp32", "model": {**GPT2, "num_layers": 4, "tied": True}}
    whole, stages = train(tmp_path / "whole", **tied), train(tmp_path / "stages", pp=2, vpp=2, **tied)
    losses = [[row["loss"] for row in result_dir.read_steps(path)] for path in (whole, stages)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_sweep_over_stages_is_held(tmp_path: Path) -> None:
    matrix = {"strategy": ["tree"], "pp": [1, 2], "vpp": [1, 2]}
    loaded = sweep(tmp_path, base=SETTINGS, matrix=matrix, exclude=[{"pp": 1, "vpp": 2}])
    for cell in loaded.cells:
        assert launch(cell.config) == 0
    verdict = judge(loaded)
    assert verdict.exit_code == 0
    assert verdict.sentence().endswith("over PP=1 VPP=1; PP=2 VPP=1; PP=2 VPP=2")


def test_verdict_over_stages_alone_is_short(tmp_path: Path) -> None:
    loaded = sweep(tmp_path, base=SETTINGS, matrix={"strategy": ["tree"], "pp": [1, 2, 4]})
    for cell in loaded.cells:
        finish(cell)
    assert judge(loaded).sentence().endswith("over PP=1, 2, 4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pp": 3}, r"pp \* vpp = 3 \* 1 does not divide num_layers=4"),
        ({"pp": 4, "vpp": 2}, r"pp \* vpp = 4 \* 2"),
        ({"vpp": 2}, "vpp=2 cuts pipeline stages and pp=1 makes none: use vpp=1, or a larger pp"),
        (
            {"pp": 2, "model": {**TINY, "tied": True}},
            "model.tied=true with pp=2 .* use batch=order-free, model.tied=false, pp=1, or",
        ),
        (
            {"pp": 2, "recompute": True, "trace": {"steps": [0]}},
            "recompute in a pipeline of pp=2 is not traced",
        ),
        ({"pp": 2, "vpp": 2, "global_batch_size": 3}, "pp=2 does not divide the 3 microbatches .* which vpp=2 needs"),
    ],
)
def test_what_stages_cannot_be_made_of_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TpcheckError, match=message) as error:
        parse_run({**SETTINGS, **settings})
    assert "\n" not in str(error.value)

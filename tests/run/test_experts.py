"""Whole runs of a mixture of experts: one digest at any layout, also of a run that changes it; what cannot be."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.support.small_run import train
from tests.support.traces import Runs
from tpcheck.config.load import parse_run
from tpcheck.errors import TpcheckError
from tpcheck.run import model
from tpcheck.sweep.spec import load_sweep

MIXTURE = ("model.preset=qwen3-moe-tiny", "batch=order-free", "micro_batch_size=1", "sequence_parallel=true", "steps=4")


def test_a_run_resumed_at_another_ep_and_tp_ends_in_the_digest_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(tmp_path, "whole", *MIXTURE)
    train(tmp_path, "pieces", *MIXTURE, "tp=2", "ep=2", "etp=1", "stop_after=1")
    sharded = ("dp=4", "ep=2", "etp=2", "distributed_optimizer=true")
    train(tmp_path, "pieces", *MIXTURE, *sharded, "stop_after=2", resume=True)
    pieces = train(tmp_path, "pieces", *MIXTURE, "dp=2", "ep=2", "etp=1", resume=True)
    assert pieces == whole
    assert whole["model"] and whole["optimizer"]


def test_traces_are_identical_at_every_layout(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    settings: dict[str, Any] = {
        "model": {"preset": "qwen3-moe-tiny", "num_layers": 1},
        "strategy": "tree",
        "batch": "order-free",
        "micro_batch_size": 1,
    }
    layout = {"tp": 2, "dp": 2, "ep": 4, "etp": 1, "sequence_parallel": True}
    found = runs.judge(layout, contextlib.nullcontext(), **settings)
    assert found.verdict == "identical" and not found.unmapped


def test_expert_parallelism_is_an_axis_where_the_batch_has_no_order(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "name: x\nbase: {model: qwen3-moe-tiny, batch: order-free}\nmatrix: {strategy: [tree]}\n"
        "layouts: [{dp: 1}, {dp: 2, ep: 2, etp: 1}]\n"
    )
    loaded = load_sweep(path)
    assert [name for name, _ in loaded.groups()] == ["tree"]
    assert [cell.variant for cell in loaded.cells] == ["DP=1", "DP=2 EP=2 ETP=1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": None}, "every ep brings an expert other sequences: use batch=order-free"),
        ({"strategy": "gather"}, "strategy=gather is not covered with experts: use strategy=tree"),
        ({"model": "qwen3-tiny", "ep": 2, "dp": 2}, "ep=2, etp=None spread experts, and the model has none"),
        ({"ep": 3, "dp": 3}, "ep=3 does not divide experts.number=8"),
        ({"ep": 4, "dp": 2}, r"ep \* etp = 4 \* 1 does not divide tp \* dp = 1 \* 2"),
        ({"tp": 2, "sequence_parallel": False}, "experts with tp=2 need sequence_parallel=true"),
        ({"etp": 16, "dp": 16, "global_batch_size": 32}, "experts.ffn_hidden_size=72 is not divided by etp=16"),
        ({"layers": "te", "strategy": "stock", "batch": None}, "stock draws other weights for experts of Transformer"),
        ({"model": {"preset": "qwen3-moe-tiny", "bias": True}}, "experts have no biases"),
    ],
    ids=str,
)
def test_what_a_mixture_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TpcheckError, match=message):
        parse_run({"model": "qwen3-moe-tiny", "batch": "order-free", "sequence_parallel": True, **settings})


def test_an_older_megatron_core_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_run({"model": "qwen3-moe-tiny", "strategy": "stock"})
    monkeypatch.setattr(model, "library_version", lambda name: "0.15.3")
    with pytest.raises(TpcheckError, match="experts need megatron-core >=0.16, not 0.15.3: install one"):
        model.transformer_config(config)

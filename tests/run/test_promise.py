"""The promise, by the tools that users have: `tpcheck train` and `tpcheck diff`, the trainer's own settings."""

from __future__ import annotations

import pytest

from tests.support.small_run import run_file, train
from tpcheck.cli import main


def test_a_run_resumed_at_tp_8_and_tp_1_ends_in_the_digest_of_an_uninterrupted_one(tmp_path):
    steps = ("strategy=tree", "steps=20")
    whole = train(tmp_path, "whole", "tp=4", *steps)
    train(tmp_path, "pieces", "tp=2", "stop_after=10", *steps)
    train(tmp_path, "pieces", "tp=8", "sequence_parallel=true", "stop_after=15", *steps, resume=True)
    pieces = train(tmp_path, "pieces", "tp=1", *steps, resume=True)
    assert pieces == whole
    assert main(["diff", str(tmp_path / "whole"), str(tmp_path / "pieces")]) == 0


def test_stock_runs_differ_and_diff_says_so(tmp_path, capsys):
    for tp in (1, 2):
        train(tmp_path, f"tp{tp}", "strategy=stock", "steps=2", f"tp={tp}")
    assert main(["diff", str(tmp_path / "tp1"), str(tmp_path / "tp2")]) == 1
    assert "\nstep 1 " in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    (
        ("dtype=fp32", "recompute=true"),
        ("gradient_accumulation_fusion=true", "model.num_query_groups=4"),
        ("dp=2", "distributed_optimizer=true"),
        ("model.preset=gpt2-124m", "model.hidden_size=64", "model.num_attention_heads=8", "model.num_query_groups=8",
         "model.head_dim=8", "model.ffn_hidden_size=136", "model.max_positions=32"),
    ),
    ids=("fp32 recompute", "fused wgrad, shared KV", "dp distributed optimizer", "gpt-2 shape"),
)  # fmt: skip
def test_digests_are_one_over_tp(tmp_path, overrides):
    sizes = ("1", "4") if "dp=2" in overrides else ("1", "8")
    one, other = (train(tmp_path, f"tp{tp}", "strategy=tree", "steps=3", f"tp={tp}", *overrides) for tp in sizes)
    assert one == other and one["model"] and one["optimizer"]


def test_what_the_patches_do_not_cover_is_one_line_and_exit_2(tmp_path, capfd):
    for override, message in (
        ("tp=3", "tp=3"),
        ("model.dropout=0.1", "model.dropout=0.1"),
        ("leaves=6", "leaves"),
        ("dtype=fp8", "dtype"),
    ):
        assert main(["train", str(run_file(tmp_path)), f"output={tmp_path / 'x'}", "strategy=tree", override]) == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("tpcheck: error: ") and message in lines[0], lines

"""The promise, by the tools that users have: `tpcheck train` and `tpcheck diff`, the trainer's own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tpcheck.cli import main

RUN = """
model: {preset: qwen3-tiny, num_layers: 1}
seq_length: 24
micro_batch_size: 2
global_batch_size: 4
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def train(run_file: Path, output: str, *overrides: str, resume: bool = False) -> dict[str, Any]:
    folder = run_file.parent / output
    flags = ["--resume"] if resume else []
    assert main(["train", str(run_file), f"output={folder}", *overrides, *flags]) == 0
    digests = folder / "digests.json"
    return json.loads(digests.read_text()) if digests.exists() else {}


def test_a_run_resumed_at_tp_8_and_tp_1_ends_in_the_digest_of_an_uninterrupted_one(run_file):
    steps = ("strategy=tree", "steps=20")
    whole = train(run_file, "whole", "tp=4", *steps)
    train(run_file, "pieces", "tp=2", "stop_after=10", *steps)
    train(run_file, "pieces", "tp=8", "sequence_parallel=true", "stop_after=15", *steps, resume=True)
    pieces = train(run_file, "pieces", "tp=1", *steps, resume=True)
    assert pieces == whole
    assert main(["diff", str(run_file.parent / "whole"), str(run_file.parent / "pieces")]) == 0


def test_stock_runs_differ_and_diff_says_so(run_file, capsys):
    for tp in (1, 2):
        train(run_file, f"tp{tp}", "strategy=stock", "steps=2", f"tp={tp}")
    assert main(["diff", str(run_file.parent / "tp1"), str(run_file.parent / "tp2")]) == 1
    assert "step 1 is the first that differs" in capsys.readouterr().out


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
def test_digests_are_one_over_tp(run_file, overrides):
    sizes = ("1", "4") if "dp=2" in overrides else ("1", "8")
    one, other = (train(run_file, f"tp{tp}", "strategy=tree", "steps=3", f"tp={tp}", *overrides) for tp in sizes)
    assert one == other and one["model"] and one["optimizer"]


def test_what_the_patches_do_not_cover_is_one_line_and_exit_2(run_file, capfd):
    for override, message in (
        ("tp=3", "tp=3 does not divide leaves=8"),
        ("model.dropout=0.1", "model.dropout=0.1 depends on tp: use 0, or strategy=stock"),
        ("leaves=6", "leaves"),
        ("dtype=fp8", "dtype"),
    ):
        assert main(["train", str(run_file), f"output={run_file.parent / 'x'}", "strategy=tree", override]) == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("tpcheck: error: ") and message in lines[0], lines

"""Traces of Transformer Engine's layers: the same names and logical tensors as those of Megatron's local ones."""

from __future__ import annotations

from pathlib import Path

from tests.support.traces import TINY, traced
from tpcheck.trace.compare.command import compare


def test_te_layers_are_rounding_away_from_local_ones_and_share_their_names(tmp_path: Path) -> None:
    local = traced(tmp_path / "local", strategy="tree")
    te = traced(tmp_path / "te", strategy="tree", layers="te", tp=2, sequence_parallel=True)
    found = compare(local, te)
    assert found.verdict in ("identical", "rounding"), found.first
    grads = {row.key.name for row in found.rows if row.key.kind == "grad"}
    assert {"decoder.layers.0.input_layernorm.weight", "decoder.layers.1.pre_mlp_layernorm.weight"} <= grads
    # What TE fuses has no tensor of its own between, and inside attention each has modules of its own.
    fused = ("layernorm is only in A", "linear_qkv is only in A", "linear_fc1 is only in A")
    assert not [note for note in found.unmapped if not note.endswith(fused) and "core_attention" not in note]
    assert {"decoder.layers.1.mlp.linear_fc2", "output_layer"} <= {row.key.name for row in found.rows}


def test_grouped_experts_have_the_names_and_gradients_of_sequential_ones(tmp_path: Path) -> None:
    mixture = {"model": {**TINY, "preset": "qwen3-moe-tiny"}, "strategy": "tree", "batch": "order-free"}
    local = traced(tmp_path / "local", **mixture, micro_batch_size=1)
    layout = {"tp": 2, "dp": 2, "ep": 4, "etp": 1, "sequence_parallel": True}
    te = traced(tmp_path / "te", **mixture, micro_batch_size=1, layers="te", **layout)
    found = compare(local, te)
    assert found.verdict in ("identical", "rounding"), found.first
    grads = {row.key.name for row in found.rows if row.key.kind == "grad"}
    assert {f"decoder.layers.1.mlp.experts.local_experts.{n}.linear_fc1.weight" for n in range(8)} <= grads

"""`tpcheck train` with layers=te: the digests of layers=local, at every TP size, and what the manifest says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.small_run import train


def manifest(folder: Path, output: str) -> dict[str, Any]:
    return json.loads((folder / output / "manifest.json").read_text())


def test_te_layers_end_in_the_digest_of_local_ones(tmp_path):
    local = train(tmp_path, "local", "layers=local", "steps=3")
    te = train(tmp_path, "te", "layers=te", "steps=3", "tp=2", "sequence_parallel=true")
    assert [te[part] for part in ("model", "optimizer")] == [local[part] for part in ("model", "optimizer")]
    assert manifest(tmp_path, "local")["attention"] == "megatron"
    assert manifest(tmp_path, "te")["attention"] == "te unfused"


def test_a_te_run_resumed_at_another_tp_ends_in_the_digest_of_an_uninterrupted_one(tmp_path):
    whole = train(tmp_path, "whole", "layers=te", "steps=3")
    train(tmp_path, "pieces", "layers=te", "steps=3", "tp=2", "stop_after=2")
    assert train(tmp_path, "pieces", "layers=te", "steps=3", "tp=4", resume=True) == whole


def values(found: dict[str, Any]) -> list[list[str]]:
    """Tensors of a digest without their names: the local layers' checkpoints give a mixture's norm that of fc1's."""
    return [sorted(tensor["digest"] for tensor in part.values()) for part in found["tensors"].values()]


def test_grouped_experts_end_in_the_tensors_of_sequential_ones_also_where_a_run_is_resumed(tmp_path):
    mixture = ("model.preset=qwen3-moe-tiny", "batch=order-free", "micro_batch_size=1", "steps=3")
    local = train(tmp_path, "local", *mixture, "layers=local")
    tp2 = ("tp=2", "ep=2", "etp=1", "sequence_parallel=true")
    te = train(tmp_path, "te", *mixture, "layers=te", *tp2)
    assert values(te) == values(local) and len(values(te)[1]) == 37
    train(tmp_path, "pieces", *mixture, "layers=te", "dp=4", "ep=2", "etp=2", "stop_after=1")
    assert train(tmp_path, "pieces", *mixture, "layers=te", *tp2, resume=True) == te

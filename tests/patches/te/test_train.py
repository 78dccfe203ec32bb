"""`tpcheck train` with layers=te: the digests of layers=local, at every TP size, and what the manifest says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.run.test_promise import run_file, train  # noqa: F401


def manifest(run_file: Path, output: str) -> dict[str, Any]:  # noqa: F811
    return json.loads((run_file.parent / output / "manifest.json").read_text())


def test_te_layers_end_in_the_digest_of_local_ones(run_file):  # noqa: F811
    local = train(run_file, "local", "layers=local", "steps=3")
    te = train(run_file, "te", "layers=te", "steps=3", "tp=2", "sequence_parallel=true")
    assert te == local
    assert manifest(run_file, "local")["attention"] == "megatron"
    assert manifest(run_file, "te")["attention"] == "te unfused"


def test_a_te_run_resumed_at_another_tp_ends_in_the_digest_of_an_uninterrupted_one(run_file):  # noqa: F811
    whole = train(run_file, "whole", "layers=te", "steps=3")
    train(run_file, "pieces", "layers=te", "steps=3", "tp=2", "stop_after=2")
    assert train(run_file, "pieces", "layers=te", "steps=3", "tp=4", resume=True) == whole

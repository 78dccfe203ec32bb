"""`tpcheck.trace` around DeepSpeed's engine: ZeRO 0 to 3, AutoTP; skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.hugging_face import deepspeed_run, reference
from tests.support.ranks import on_ranks
from tpcheck.trace.compare.command import compare
from tpcheck.trace.compare.judge import Comparison

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("deepspeed", reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain torch, one process."""
    return reference(tmp_path_factory.mktemp("deepspeed") / "one")


def _kinds(found: Comparison) -> set[str]:
    return {row.key.kind for row in found.rows}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_is_rounding_away_from_plain_torch(one: Path, tmp_path: Path, stage: int) -> None:
    on_ranks(2, deepspeed_run, str(tmp_path / "run"), {"zero_optimization": {"stage": stage}})
    found = compare(one, tmp_path / "run")
    assert found.verdict == "rounding", found.first
    assert _kinds(found) >= {"start", "out", "dout", "din", "grad", "weight", "state.exp_avg", "state.exp_avg_sq"}
    grads = {row.key for row in found.rows if row.key.kind == "grad"}
    assert grads == {key for key in found.a.order if key.kind == "grad"}
    # Each rank's loss is of its own samples; above stage 0, clipping is DeepSpeed's own affair. Stage 3 wraps what
    # modules return, so that what a child hands on is recorded under its parent's name too.
    expected = ("whole model", "rotary_emb", "gradient clipping", *(["is only in B"] if stage == 3 else []))
    assert not [note for note in found.unmapped if not any(name in note for name in expected)]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_whose_gradient_counts_half_is_found(one: Path, tmp_path: Path, stage: int) -> None:
    on_ranks(2, deepspeed_run, str(tmp_path / "run"), {"zero_optimization": {"stage": stage}}, "Qwen3", True)
    wrong = compare(one, tmp_path / "run").first
    assert wrong is not None and (wrong.key.kind, wrong.key.name) == ("grad", "model.layers.1.mlp.up_proj.weight")


def test_clipping_that_only_one_of_the_runs_does_is_found(one: Path, tmp_path: Path) -> None:
    on_ranks(2, deepspeed_run, str(tmp_path / "run"), {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0})
    wrong = compare(one, tmp_path / "run").first
    assert wrong is not None and wrong.key.kind == "state.exp_avg" and "scaled by 0." in wrong.why


def test_autotp_is_mapped_by_its_partition_sizes(tmp_path: Path) -> None:
    one = reference(tmp_path / "one", "Qwen2")
    plan = {"tensor_parallel": {"autotp_size": 2, "preset_model": "qwen2"}}
    on_ranks(2, deepspeed_run, str(tmp_path / "run"), plan, "Qwen2")
    found = compare(one, tmp_path / "run")
    assert found.verdict == "rounding", found.first
    shapes = {(row.key.kind, row.key.name): row.shape for row in found.rows}
    layer = "model.layers.0"
    assert shapes["out", f"{layer}.self_attn.q_proj"] == (4, 12, 32)
    assert shapes["din", f"{layer}.mlp.down_proj"] == (4, 12, 48)
    assert shapes["grad", f"{layer}.self_attn.k_proj.bias"] == (16,)
    assert shapes["grad", f"{layer}.self_attn.o_proj.weight"] == (32, 32)
    assert (found.b.tp, found.b.dp) == (2, 1)


def test_the_model_inside_an_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="trace the engine that deepspeed.initialize returned"):
        on_ranks(1, deepspeed_run, str(tmp_path / "run"), {"zero_optimization": {"stage": 1}}, "Qwen3", False, True)

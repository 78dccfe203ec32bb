"""Optimizers saved as `fully_reshardable`: stock loses the padding between DDP buckets, and such are never digested."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from tests.support.bits import raw
from tests.support.megatron_checkpoints import load_and_save, save_after_step
from tests.support.torch_dist import along, save, whole
from tpcheck.checkpoint.diff import CANNOT_TELL, DIFFERENT, IDENTICAL, diff
from tpcheck.checkpoint.digest import digest_checkpoint
from tpcheck.checkpoint.main_parameters import count_unlike
from tpcheck.cli import main

BUCKET = 2000  # elements: the model has several times as many
# Every parameter's size is a multiple of 128, so that no bucket is padded.
UNPADDED = {"preset": "qwen3-tiny", "num_layers": 1, "hidden_size": 128, "head_dim": 128, "num_attention_heads": 1,
            "num_query_groups": 1, "ffn_hidden_size": 128}  # fmt: skip
WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.skipif(
    "fully_reshardable" not in getattr(DistributedOptimizer, "checkpoint_fully_reshardable_formats", ()),
    reason="this megatron-core does not have the format yet",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    paths: dict[str, Path] = {}

    def get(**settings: Any) -> Path:
        key = repr(settings)
        if key not in paths:
            folder = tmp_path_factory.mktemp("way")
            paths[key] = save_after_step(folder, dp=2, distributed_optimizer=True, **settings)
        return paths[key]

    return get


def test_an_optimizer_whose_weights_were_misplaced_has_no_digest_and_a_note_says_so(saved: Any) -> None:
    good, bad = digest_checkpoint(saved()), digest_checkpoint(saved(bucket_size=BUCKET))
    assert good.optimizer and not good.notes
    assert bad.model == good.model
    assert bad.optimizer is None and not bad.tensors["optimizer"]
    assert "fully_reshardable" in bad.notes[0] and "--overlap-grad-reduce" in bad.notes[0]


def test_hash_prints_the_model_and_the_reason_and_no_optimizer(saved: Any, capsys: Any) -> None:
    assert main(["hash", "--tensors", str(saved(bucket_size=BUCKET))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any("optimizer" in line for line in lines if not line.startswith("#"))
    assert any(line.startswith("# ") and "fully_reshardable" in line for line in lines)


def test_several_buckets_without_padding_are_saved_right_and_digested(saved: Any) -> None:
    one, several = (digest_checkpoint(saved(model=UNPADDED, bucket_size=size)) for size in (None, BUCKET))
    assert one.optimizer
    assert one == several


@pytest.mark.parametrize("tp", [1, 2])
def test_under_the_patches_several_buckets_are_saved_like_one(tp: int, saved: Any) -> None:
    found = digest_checkpoint(saved(bucket_size=BUCKET, patched=True, tp=tp))
    assert found == digest_checkpoint(saved(tp=tp))


def test_stock_loads_what_was_saved_under_the_patches_into_other_buckets(saved: Any, tmp_path: Path) -> None:
    source = saved(bucket_size=BUCKET, patched=True)
    for size in (None, BUCKET // 2):
        again = load_and_save(source, tmp_path / str(size), bucket_size=size, dp=2, distributed_optimizer=True)
        assert digest_checkpoint(again) == digest_checkpoint(source)


def test_diff_compares_the_model_and_cannot_tell_about_the_optimizer(saved: Any) -> None:
    report = diff(saved(), saved(bucket_size=BUCKET))
    assert report.exit_code == CANNOT_TELL
    assert report.compared["model"] and not report.compared["optimizer"]
    assert len(report.doubts) == 1
    assert report.doubts[0].startswith("B: ") and "fully_reshardable" in report.doubts[0]
    assert diff(saved(bucket_size=BUCKET), saved(bucket_size=BUCKET)).exit_code == CANNOT_TELL


def test_diff_says_that_models_differ_whatever_became_of_the_optimizer(saved: Any) -> None:
    report = diff(saved(), saved(bucket_size=BUCKET, seed=4321))
    assert report.exit_code == DIFFERENT


def common(kind: str) -> dict[str, Any]:
    inner = {"param_groups": [{"step": 1}]}
    return {"optimizer": {0: {"optimizer": inner, "param_state_sharding_type": kind}}}


def checkpoint(path: Path, weight: torch.Tensor, main_weight: torch.Tensor, kind: str, cut: Any = whole) -> Path:
    tensors = {"w": weight, "chained_0.optimizer.state.param.w": main_weight}
    return save(path, tensors, cut, common=common(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cut", [whole, along(0, 3), along(1, 2)])
def test_one_main_weight_that_does_not_round_to_the_model_s_costs_the_digest(
    dtype: torch.dtype, cut: Any, tmp_path: Path
) -> None:
    shifted = WEIGHT.flatten().roll(1).reshape(WEIGHT.shape)
    moved = WEIGHT.clone()
    moved[5, 7] *= 2
    found = {
        name: digest_checkpoint(
            checkpoint(tmp_path / name, WEIGHT.to(dtype), main_weight, "fully_reshardable", cut)
        ).optimizer
        for name, main_weight in {"right": WEIGHT, "shifted": shifted, "moved": moved}.items()
    }
    assert found["right"] is not None
    assert found["shifted"] is None and found["moved"] is None


def test_in_another_format_such_an_optimizer_keeps_its_digest_and_gets_a_note(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x", WEIGHT.bfloat16(), WEIGHT * 2, "fully_sharded_model_space")
    found = digest_checkpoint(path)
    assert found.optimizer
    assert "48 of 48 elements" in found.notes[0]
    assert diff(path, path).exit_code == IDENTICAL


# A float32 and the bfloat16s that it may be rounded to: a tie either way, zeros of both signs, overflow, NaNs.
ROUNDED = [
    (1 + 2**-8, 1.0, True), (1 + 2**-8, 1 + 2**-7, True), (1 + 2**-8 + 2**-20, 1.0, False),
    (-1 - 2**-8, -1.0, True), (1.0, -1.0, False), (0.0, 0.0, True), (0.0, -0.0, False), (-1e-45, -0.0, True),
    (3.4e38, float("inf"), True), (float("nan"), float("nan"), True), (float("nan"), 1.0, False),
    (1.0, float("nan"), False), (1e-45, -0.0, False), (-float("nan"), float("nan"), True),
]  # fmt: skip


@pytest.mark.parametrize(("main_weight", "weight", "same"), ROUNDED)
def test_a_main_weight_is_the_model_s_if_that_is_nearest_to_it(main_weight: float, weight: float, same: bool) -> None:
    main_bytes = raw(torch.tensor([main_weight], dtype=torch.float32))
    weight_bytes = raw(torch.tensor([weight]).bfloat16())
    found = count_unlike(iter([memoryview(main_bytes)]), iter([memoryview(weight_bytes)]), "bfloat16")
    assert found == (not same)


def test_what_torch_rounds_is_the_model_s_however_the_streams_are_cut() -> None:
    main_weight = torch.randn(1000) * 10.0 ** torch.randint(-45, 38, (1000,))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        mains = [memoryview(raw(piece)) for piece in main_weight.split(7)]
        weights = [memoryview(raw(piece)) for piece in main_weight.to(dtype).split(11)]
        assert count_unlike(iter(mains), iter(weights), name) == 0
        weights.reverse()
        assert count_unlike(iter(mains), iter(weights), name) > 500

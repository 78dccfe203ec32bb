"""`tpcheck diff`: identical, different from where on, or can't tell and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.torch_dist import along, optimizer_step, save
from tpcheck.checkpoint.diff import CANNOT_TELL, DIFFERENT, IDENTICAL, diff
from tpcheck.checkpoint.diff_text import lines
from tpcheck.checkpoint.digest import digest_checkpoint
from tpcheck.checkpoint.ulp import Difference
from tpcheck.cli import main
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir

LAST = 4
TENSORS = {
    "decoder.layers.weight": torch.linspace(-1, 1, 240).reshape(5, 6, 8).bfloat16(),
    "embedding.weight": torch.linspace(-1, 1, 32).reshape(4, 8).bfloat16(),
    "optimizer.state.exp_avg.embedding.weight": torch.linspace(-1, 1, 32).reshape(4, 8),
}


def one_ulp_up(name: str, *elements: int) -> dict[str, torch.Tensor]:
    """TENSORS with some elements of one tensor moved to the next representable number away from zero."""
    tensor = TENSORS[name].clone()
    bits = tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).view(-1)
    bits[list(elements)] += 1
    return {**TENSORS, name: tensor}


def run(
    path: Path,
    tensors: dict[str, torch.Tensor] = TENSORS,
    *,
    losses: dict[int, float] | None = None,
    steps: int = LAST,
    tp: int = 1,
    at: tuple[int, ...] = (LAST,),
    finished: bool = True,
    keep: bool = True,
) -> Path:
    """A result directory with checkpoints at the steps `at`; `losses` are those that are not 1 / step."""
    path.mkdir()
    config = {"tp": tp, "output": str(path), "optimizer": {"lr": 0.1}}
    result_dir.write_manifest(path, {"config": config, "versions": {"torch": "2"}, "data": {"digest": "d"}})
    for step in range(1, steps + 1):
        loss = (losses or {}).get(step, 1 / step)
        record = {"step": step, "loss": loss, "loss_hex": loss.hex(), "grad_norm": 2.0, "grad_norm_hex": (2.0).hex()}
        result_dir.append_step(path, {**record, "seconds": torch.rand(1).item()})
    for step in at:
        saved = save(result_dir.checkpoint_path(path, step), tensors, along(1, tp), common=optimizer_step(step))
        if finished and step == at[-1]:
            result_dir.write_digests(path, {"step": step, **digest_checkpoint(saved).to_json()})
    if not keep:
        shutil.rmtree(path / "checkpoints")
    return path


def test_runs_that_differ_only_in_how_they_ran_are_identical(tmp_path: Path) -> None:
    report = diff(run(tmp_path / "a", tp=1), run(tmp_path / "b", tp=2))
    assert report.exit_code == IDENTICAL
    assert report.config == {"tp": (1, 2)}
    assert report.steps == LAST
    assert report.state == LAST
    assert report.compared == {"model": 2, "optimizer": 2}


def test_the_first_step_that_differs_is_named_with_both_losses(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a"), run(tmp_path / "b", losses={3: 0.3, 4: 0.2})
    report = diff(a, b)
    assert report.exit_code == DIFFERENT
    assert report.first is not None
    assert report.first.step == 3
    assert report.first.values == {"loss": ((1 / 3).hex(), (0.3).hex())}


def test_a_loss_that_is_not_a_number_on_both_sides_is_equal(tmp_path: Path) -> None:
    losses = {2: float("nan")}
    assert diff(run(tmp_path / "a", losses=losses), run(tmp_path / "b", losses=losses)).exit_code == IDENTICAL


def test_tensors_that_differ_are_counted_in_elements_and_ulps(tmp_path: Path) -> None:
    changed = one_ulp_up("decoder.layers.weight", 0, 17, 239)
    report = diff(run(tmp_path / "a", tp=1), run(tmp_path / "b", changed, tp=2))
    assert report.exit_code == DIFFERENT
    assert report.first is None
    (tensor,) = report.tensors
    assert (tensor.part, tensor.name, tensor.shape) == ("model", "decoder.layers.weight", (5, 6, 8))
    assert tensor.elements == Difference(3, 0, 2.0**-7, 1)


def test_without_checkpoints_the_digests_still_name_the_tensors(tmp_path: Path) -> None:
    a = run(tmp_path / "a", keep=False)
    assert diff(a, run(tmp_path / "same", keep=False)).exit_code == IDENTICAL
    report = diff(a, run(tmp_path / "b", one_ulp_up("embedding.weight", 5)))
    assert report.exit_code == DIFFERENT
    assert [(tensor.name, tensor.elements) for tensor in report.tensors] == [("embedding.weight", None)]


def test_a_run_that_is_a_prefix_of_another_cannot_be_told_from_it(tmp_path: Path) -> None:
    report = diff(run(tmp_path / "a", at=(2, 4)), run(tmp_path / "b", steps=2, at=(2,)))
    assert report.exit_code == CANNOT_TELL
    assert (report.first, report.tensors, report.state) == (None, [], 2)
    assert report.doubts == ["A has steps 1 to 4, B has steps 1 to 2: compared where both have them"]


def test_a_shorter_run_that_already_differs_is_different(tmp_path: Path) -> None:
    assert diff(run(tmp_path / "a"), run(tmp_path / "b", steps=2, at=(), losses={2: 7.0})).exit_code == DIFFERENT


def test_different_models_are_not_compared(tmp_path: Path) -> None:
    wider = {**TENSORS, "embedding.weight": torch.ones(8, 8).bfloat16(), "decoder.layers.weight": torch.ones(1)}
    report = diff(run(tmp_path / "a"), run(tmp_path / "b", wider, losses={1: 9.0}))
    assert report.exit_code == CANNOT_TELL
    assert "different models: 2 tensors are not the same kind" in report.doubts[0]
    assert "bfloat16[5, 6, 8] in A, float32[1] in B" in report.doubts[0]


def test_a_model_saved_with_its_optimizer_and_one_without_are_compared_as_far_as_they_go(tmp_path: Path) -> None:
    bare = {name: tensor for name, tensor in TENSORS.items() if "optimizer" not in name}
    a, b = save(tmp_path / "a", TENSORS), save(tmp_path / "b", bare)
    report = diff(a, b)
    assert report.exit_code == CANNOT_TELL
    assert report.compared == {"model": 2, "optimizer": 0}
    assert diff(b, save(tmp_path / "c", bare)).exit_code == IDENTICAL
    changed = {**bare, "embedding.weight": one_ulp_up("embedding.weight", 1)["embedding.weight"]}
    assert diff(a, save(tmp_path / "d", changed)).exit_code == DIFFERENT


def test_flat_optimizer_buffers_leave_a_doubt(tmp_path: Path) -> None:
    flat = {"w": torch.ones(1), "optimizer.distributed.dp_group_idx_0.param": torch.ones(4)}
    report = diff(save(tmp_path / "a", flat), save(tmp_path / "b", flat))
    assert report.exit_code == CANNOT_TELL
    assert "flat buffers" in report.doubts[0]


def test_runs_without_a_state_in_common_leave_a_doubt(tmp_path: Path) -> None:
    report = diff(run(tmp_path / "a", at=(2,), finished=False), run(tmp_path / "b", at=(3,), finished=False))
    assert report.exit_code == CANNOT_TELL
    assert any("no state in common" in doubt for doubt in report.doubts)
    assert any("B has not come to its end" in doubt for doubt in report.doubts)


def test_unfinished_runs_are_compared_at_their_last_common_checkpoint(tmp_path: Path) -> None:
    changed = one_ulp_up("embedding.weight", 3)
    report = diff(run(tmp_path / "a", at=(2, 3), finished=False), run(tmp_path / "b", changed, at=(2, 4)))
    assert report.exit_code == DIFFERENT
    assert report.state == 2


def test_a_run_is_compared_with_a_bare_checkpoint_by_its_last_state(tmp_path: Path) -> None:
    a = run(tmp_path / "a", at=(2, 4))
    same = save(tmp_path / "b", TENSORS, common=optimizer_step(LAST))
    assert diff(a, same).exit_code == diff(same, a).exit_code == IDENTICAL
    assert diff(a, save(tmp_path / "c", TENSORS, common=optimizer_step(2))).exit_code == DIFFERENT


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    a = run(tmp_path / "a")
    (a / "manifest.json").unlink()
    with pytest.raises(TpcheckError, match=r"no manifest\.json"):
        diff(a, a)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TpcheckError, match="empty"):
        diff(tmp_path / "empty", tmp_path / "empty")


def test_the_text_lists_ten_tensors_and_all_on_request(tmp_path: Path, capsys: Any) -> None:
    many = {f"layer{index:02}.weight": torch.ones(2) for index in range(13)}
    save(tmp_path / "a", many)
    save(tmp_path / "b", {name: tensor * 2 for name, tensor in many.items()})
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == DIFFERENT
    text = capsys.readouterr().out
    assert text.count("float32[2]: 2 of 2 elements, max abs 1, max 8388608 ulp") == 10
    assert "3 more, with --all" in text
    assert text.splitlines()[-1] == "different"
    assert main(["diff", "--all", str(tmp_path / "a"), str(tmp_path / "b")]) == DIFFERENT
    assert capsys.readouterr().out.count("float32[2]") == 13


def test_the_text_tells_the_story_in_a_few_lines(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a"), run(tmp_path / "b", one_ulp_up("embedding.weight", 3), losses={2: 0.25}, tp=2)
    assert (
        "\n".join(lines(diff(a, b)))
        == f"""\
A  {a}
B  {b}
config  tp: 1 in A, 2 in B
step 2 is the first that differs
  loss       0x1.0000000000000p-1 in A, 0x1.0000000000000p-2 in B  (0.5, 0.25)
model at step 4  1 of 2 tensors differ
optimizer at step 4  all 2 tensors are equal
  embedding.weight  bfloat16[4, 8]: 1 of 32 elements, max abs 0.00391, max 1 ulp
digests  of A and B on record; --verify computes them anew from the checkpoints
different"""
    )


def test_json_says_the_same(tmp_path: Path, capsys: Any) -> None:
    a, b = run(tmp_path / "a"), run(tmp_path / "b", one_ulp_up("embedding.weight", 3), losses={2: 0.25})
    assert main(["diff", "--json", str(a), str(b)]) == DIFFERENT
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == "different"
    assert found["first"] == {"step": 2, "values": {"loss": [(0.5).hex(), (0.25).hex()]}}
    assert found["tensors"][0]["elements"]["max_ulp"] == 1

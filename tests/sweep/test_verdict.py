"""The verdict on a sweep, from result directories alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import BEFORE, ROOT
from tests.support.finished import begin, finish, sweep, sweep_file
from tpcheck.cli import main
from tpcheck.errors import TpcheckError
from tpcheck.sweep import verdict
from tpcheck.sweep.spec import Sweep, load_sweep
from tpcheck.sweep.stored_spec import write_sweep


def judge(of: Sweep) -> verdict.Verdict:
    return verdict.judge(of, lambda a, b: [f"compared {a.name}", f"with {b.name}"])


@pytest.fixture
def cells(tmp_path: Path) -> Sweep:
    return sweep(tmp_path, matrix={"strategy": ["stock", "tree"], "tp": [1, 2, 4]})


def complete(of: Sweep, **digests: str) -> None:
    """Every cell trained; equal digests but for the cells named, with `_` for `-`."""
    for cell in of.cells:
        finish(cell, model=digests.get(cell.name.replace("-", "_"), "aa"))


def test_equal_digests_hold_the_promise_whatever_stock_does(cells: Sweep) -> None:
    complete(cells, stock_tp2="cc", stock_tp4="dd")
    found = judge(cells)
    assert found.exit_code == 0
    assert [group.status for group in found.groups] == ["different", "identical"]
    assert found.sentence() == "HELD: tree: one digest each, of the model and of the optimizer, over TP=1, 2, 4"
    assert found.rows() == [
        ("stock", "3 of 3: TP=1, 2, 4", "3 different", "one: bbbbbbbbbbbb", "different, not promised"),
        ("tree", "3 of 3: TP=1, 2, 4", "one: aa", "one: bbbbbbbbbbbb", "identical"),
    ]


def test_one_other_model_digest_breaks_the_promise_and_the_two_runs_are_compared(cells: Sweep) -> None:
    complete(cells, tree_tp4="ee")
    found = judge(cells)
    assert found.exit_code == 1
    assert found.details() == ["tree: tree-tp1 and tree-tp4 differ", "  compared tree-tp1", "  with tree-tp4"]


def test_one_other_optimizer_digest_breaks_the_promise(cells: Sweep) -> None:
    for cell in cells.cells:
        finish(cell, optimizer="ff" if cell.name == "tree-tp2" else "bb")
    assert judge(cells).exit_code == 1


def test_an_optimizer_that_has_no_digest_is_no_difference_but_leaves_no_verdict(cells: Sweep) -> None:
    for cell in cells.cells:
        without: dict[str, Any] = {"optimizer": None, "notes": ["it is not to be trusted"]}
        finish(cell, **(without if cell.name == "tree-tp2" else {}))
    found = judge(cells)
    assert found.exit_code == 2
    assert found.groups[1].status == "identical"
    assert found.sentence() == "no verdict: tree: one digest of the model, but not every optimizer has one"
    assert found.details() == ["tree-tp2: it is not to be trusted"]
    assert found.rows()[1][3] == "one: bbbbbbbbbbbb, 1 without"


def test_cells_whose_products_are_of_another_kind_were_not_promised_to_be_equal(tmp_path: Path) -> None:
    of = sweep(tmp_path, matrix={"arch": ["h100", "b300"], "strategy": ["tree"], "tp": [1, 2, 4]})
    for cell in of.cells:
        if cell.name != "b300-tree-tp4":
            products = {"kernel": "gemm_gpu", "family": "sm_90" if cell.arch == "h100" else "sm_100"}
            finish(cell, model="aa" if cell.arch == "h100" else "cc", products=products)
    found = judge(of)
    assert found.exit_code == 2
    assert [(group.name, len(group.cells), group.status) for group in found.groups] == [
        ("tree (sm_90 products)", 3, "identical"),
        ("tree (sm_100 products)", 3, "incomplete"),
    ]


def test_architectures_of_one_class_of_bits_are_compared(tmp_path: Path) -> None:
    of = sweep(tmp_path, matrix={"arch": ["h100", "b300"], "strategy": ["tree"], "tp": [1, 2]})
    for cell in of.cells:
        alone = cell.name == "b300-tree-tp2"
        finish(cell, model="cc" if alone else "aa", products={"class": "k16-25", "functions": "ab"})
    found = judge(of)
    assert found.exit_code == 1 and [len(group.cells) for group in found.groups] == [4]


@pytest.mark.parametrize(
    "other",
    (
        {"class": "sm_103", "functions": "ab"},
        {"class": "k16-25", "functions": "cd"},
        {"class": "k16-25", "functions": "ab", "attention": "flash on B300"},
    ),
)
def test_architectures_of_two_classes_or_with_other_functions_are_parted_and_nobody_is_to_blame(
    other: dict[str, Any], tmp_path: Path
) -> None:
    of = sweep(tmp_path, matrix={"arch": ["h100", "b300"], "strategy": ["tree"], "tp": [1, 2]})
    for cell in of.cells:
        h100 = cell.arch == "h100"
        finish(cell, model="aa" if h100 else "cc", products={"class": "k16-25", "functions": "ab"} if h100 else other)
    found = judge(of)
    assert found.exit_code == 0 and [len(group.cells) for group in found.groups] == [2, 2]
    assert found.groups[0].name.startswith("tree (k16-25 products")


def test_products_of_one_family_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    of = sweep(tmp_path, matrix={"strategy": ["tree"], "tp": [1, 2]})
    for cell, triton in zip(of.cells, ("3.4.0", "3.6.0"), strict=True):
        finish(cell, products={"family": "sm_90", "triton": triton, "sums": {"order": triton}})
    found = judge(of)
    names = ["tree (sm_90 products, triton 3.4.0, sums)", "tree (sm_90 products, triton 3.6.0, sums)"]
    assert [group.name for group in found.groups] == names
    assert found.exit_code == 2
    assert found.sentence().startswith(f"no verdict: {', '.join(names)} cannot be compared")


def test_cells_that_were_trained_on_other_data_break_no_promise_and_hold_none(tmp_path: Path) -> None:
    of = sweep(tmp_path, matrix={"strategy": ["stock", "tree"], "tp": [1, 2]})
    for cell in of.cells:
        digest = f"{cell.config.tp}" * 64
        finish(cell, model=digest, data={"digest": digest})
    found = judge(of)
    assert found.exit_code == 2
    names = ["tree (exact products, data 111111111111)", "tree (exact products, data 222222222222)"]
    assert [group.name for group in found.groups[1:]] == names
    assert found.sentence().startswith(f"no verdict: {', '.join(names)} cannot be compared")


def test_cells_from_before_manifests_told_of_products_had_exact_ones(tmp_path: Path) -> None:
    of = sweep(tmp_path, matrix={"strategy": ["tree"], "tp": [1, 2, 4]})
    manifests: tuple[dict[str, Any], ...] = ({}, {"products": {"leaf": "exact"}}, {"products": {"family": "sm_90"}})
    for cell, manifest in zip(of.cells, manifests, strict=True):
        finish(cell, **manifest)
    assert [(group.name, len(group.cells)) for group in judge(of).groups] == [
        ("tree (exact products)", 2),
        ("tree (sm_90 products)", 1),
    ]


def test_a_manifest_whose_products_are_damaged_is_refused(tmp_path: Path) -> None:
    of = sweep(tmp_path, matrix={"strategy": ["tree"], "tp": [1, 2]})
    for cell in of.cells:
        finish(cell, products="exact")
    with pytest.raises(TpcheckError, match="'products': Input should be a valid dictionary, not 'exact'"):
        judge(of)


def test_missing_cells_are_named_and_give_exit_code_2(cells: Sweep) -> None:
    finish(cells.cells[0])
    begin(cells.cells[1], [3.0])
    found = judge(cells)
    assert found.exit_code == 2
    assert found.details() == ["missing: stock-tp2, stock-tp4, tree-tp1, tree-tp2, tree-tp4"]
    assert found.sentence() == "no verdict yet: 5 of 6 cells are missing"


def test_a_broken_promise_outweighs_missing_cells(cells: Sweep) -> None:
    finish(cells.cells[3], model="aa")
    finish(cells.cells[4], model="cc")
    assert judge(cells).exit_code == 1


def test_digests_of_an_earlier_step_do_not_complete_a_cell(cells: Sweep) -> None:
    complete(cells)
    path = cells.cells[0].path / "digests.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 2}))
    assert judge(cells).missing == ["stock-tp1"]


def test_a_group_of_one_cell_is_no_proof(tmp_path: Path) -> None:
    alone = sweep(tmp_path, matrix={"strategy": ["tree"], "seed": [1, 2]})
    complete(alone)
    found = judge(alone)
    assert [group.status for group in found.groups] == ["alone", "alone"]
    assert found.sentence().startswith("nothing was promised and compared")


def test_invariant_settings_are_the_sweep_files_choice(tmp_path: Path) -> None:
    both = sweep(tmp_path, matrix={"strategy": ["tree"], "threads": [1, 2]}, invariant=["threads"])
    complete(both)
    assert (
        judge(both).sentence()
        == "HELD: tree: one digest each, of the model and of the optimizer, over threads1; threads2"
    )


def test_the_verdict_is_written_beside_the_cells(cells: Sweep) -> None:
    complete(cells, stock_tp2="cc")
    written = json.loads(verdict.write(judge(cells), cells.output).read_text())
    assert written["exit_code"] == 0
    assert written["groups"][1]["cells"]["tree-tp1"] == {"model": "aa", "optimizer": "bb" * 32}
    assert [group["status"] for group in written["groups"]] == ["different", "identical"]


def test_an_optimizer_without_a_digest_is_not_called_equal(cells: Sweep) -> None:
    complete(cells)
    for cell in cells.cells:
        path = cell.path / "digests.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "optimizer": None}))
    found = judge(cells)
    assert found.rows()[1][3] == "-"
    assert (
        found.sentence()
        == "HELD: tree: one digest each, of the model (there is none of the optimizer), over TP=1, 2, 4"
    )


def test_a_cell_that_is_not_what_the_sweep_says_is_not_counted(cells: Sweep) -> None:
    complete(cells)
    shutil.rmtree(cells.cells[4].path)
    shutil.copytree(cells.cells[3].path, cells.cells[4].path)  # tree-tp1 passes for tree-tp2
    found = judge(cells)
    assert found.exit_code == 2
    assert found.sentence() == "no verdict: tree-tp2 can't be counted"
    assert found.details() == [
        "tree-tp2: was made with other settings (tp: 1 there, 2 now): train it again",
    ]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of a finished sweep, with its checkpoints."""
    shutil.unpack_archive(BEFORE / "states.tar.xz", tmp_path)
    shutil.copytree(BEFORE / "before", tmp_path / "before", dirs_exist_ok=True)
    return tmp_path / "before"


def test_verifying_digests_every_checkpoint_anew(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verdict", str(old), "--verify"]) == 0
    assert "by digests computed anew from the checkpoints" in capsys.readouterr().out
    assert main(["diff", str(old / "tree-tp1"), str(old / "tree-tp2"), "--verify"]) == 0
    assert "on record" not in capsys.readouterr().out
    assert json.loads((old / "verdict.json").read_text())["verified"] is True


@pytest.mark.parametrize("damage", ["flipped", "gone", "cut short"])
def test_a_damaged_checkpoint_does_not_stay_silent(damage: str, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = old / "tree-tp2/checkpoints/step-00000004"
    shard = folder / "__0_0.distcp"
    if damage == "gone":
        shutil.rmtree(folder)
    else:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2 :: 1000] = bytes(len(content[len(content) // 2 :: 1000]))
        shard.write_bytes(content if damage == "flipped" else content[:-1000])
    assert main(["verdict", str(old), "--verify"]) == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "no verdict: tree-tp2 can't be counted" in out
    assert main(["diff", str(old / "tree-tp1"), str(old / "tree-tp2"), "--verify"]) == 2
    capsys.readouterr()
    assert main(["verdict", str(old)]) == 0  # a checkpoint that was deleted, or that only a full read finds damaged
    out = " ".join(capsys.readouterr().out.split())
    assert "by the digests on record" in out
    assert ("tree-tp2: its checkpoint can't be read" in out) == (damage == "cut short")


def test_a_digest_changed_by_hand_is_seen(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = old / "tree-tp2/digests.json"
    digests = json.loads(file.read_text())
    digests["tensors"]["model"]["output_layer.weight"]["digest"] = "0" * 64
    file.write_text(json.dumps(digests))
    for command in (["verdict", str(old)], ["diff", str(old / "tree-tp1"), str(old / "tree-tp2")]):
        assert main(command) == 2
        assert "model's digest is not that of the tensors that it lists" in capsys.readouterr().err


def test_both_totals_changed_by_hand_are_seen_when_they_are_verified(old: Path, capsys: Any) -> None:
    file = old / "tree-tp2/digests.json"
    digests = {**json.loads(file.read_text()), "tensors": {"model": {}, "optimizer": {}}, "model": "0" * 64}
    file.write_text(json.dumps(digests))
    assert main(["verdict", str(old), "--verify"]) == 2
    assert "can't be verified" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_broken_promise(old: Path) -> None:
    command = [sys.executable, "-m", "tpcheck", "verdict", str(old)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout
        process.stdout.close()
        assert process.wait(300) == 141
    assert json.loads((old / "verdict.json").read_text())["exit_code"] == 0


def test_a_sweep_goes_on_when_its_reader_goes_away(tmp_path: Path) -> None:
    file = sweep_file(tmp_path)
    for cell in load_sweep(file).cells:
        finish(cell)
    command = [sys.executable, "-m", "tpcheck", "sweep", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout
        process.stdout.close()
        assert process.wait(300) == 0


def test_a_verdict_that_cannot_be_written_is_given(
    cells: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(cells)
    write_sweep(cells)

    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(cells.output))

    monkeypatch.setattr(verdict, "write_object", refuse)
    assert main(["verdict", str(cells.output)]) == 0
    told = capsys.readouterr()
    assert "HELD" in told.out
    assert f"not written: {cells.output}: Permission denied" in told.err


def test_a_damaged_record_of_steps_leaves_the_verdict_as_it_is(
    cells: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    complete(cells)
    write_sweep(cells)
    steps = cells.cells[-1].path / "steps.jsonl"
    first, _, third = steps.read_text().splitlines()
    steps.write_text(f"{first}\n{third}\n")
    assert main(["verdict", str(cells.output)]) == 0
    told = capsys.readouterr()
    assert "HELD" in told.out
    assert f"not drawn: {steps}: step 3 stands where 2 should" in told.err

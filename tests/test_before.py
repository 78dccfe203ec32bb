"""Results of earlier commits: `tests/data/before` is read, judged, compared and resumed as it was when it was written.

    before/   a finished sweep of stock and tree at TP=1 and 2, four steps of a model of one layer
    stopped/  tree at TP=2, traced, stopped after step 2
    traced/   the same run at TP=1, traced, finished

Texts are files there; checkpoints and traces are in states.tar.xz.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import BEFORE as DATA
from tpcheck.cli import main
from tpcheck.config.load import parse_run
from tpcheck.files import result_dir

CELLS = ["stock-tp1", "stock-tp2", "tree-tp1", "tree-tp2"]
VECTORS = "AVX512"  # what the CPU had; elementwise functions have other bits at another width
LAST = "checkpoints/step-00000004"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of everything, in a folder that the results do not know."""
    copy = tmp_path / "old"
    shutil.copytree(DATA, copy)
    shutil.unpack_archive(copy / "states.tar.xz", copy)
    return copy


def load(file: Path) -> Any:
    return json.loads(file.read_text())


def digests(path: Path) -> dict[str, str]:
    """What a run's last state was, as it is on record."""
    return {part: load(path / "digests.json")[part] for part in ("model", "optimizer", "tensors")}


def is_the_machine_of(path: Path) -> bool:
    """Whether a run here must have the bits of the one in `path`."""
    from tpcheck.run.provenance import cpu_name, versions

    manifest, here = load(path / "manifest.json"), versions()
    alike = all(manifest["versions"][library] == here[library] for library in ("torch", "megatron-core", "numpy"))
    same_cpu = manifest["hardware"]["cpu"] == cpu_name() and torch.backends.cpu.get_cpu_capability() == VECTORS
    return alike and same_cpu


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_read_and_its_checkpoint_has_the_digests_on_record(
    cell: str, old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = old / "before" / cell
    config = parse_run(result_dir.read_manifest(path)["config"], cell)
    assert cell == f"{config.strategy}-tp{config.tp}"
    steps = result_dir.read_steps(path)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(float.fromhex(step["loss_hex"]) == step["loss"] for step in steps)
    final = result_dir.final_digests(path, config.steps)
    assert final == load(path / "digests.json")
    for checkpoint in (path, path / LAST):
        assert main(["hash", str(checkpoint), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {part: found[part] for part in digests(path)} == digests(path)


def test_the_sweep_is_judged_as_it_was(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    was = load(old / "before/verdict.json")
    (old / "before/verdict.json").unlink()
    assert main(["verdict", str(old / "before")]) == was["exit_code"] == 0
    assert was["verdict"] in " ".join(capsys.readouterr().out.split())
    assert was["verdict"].startswith("HELD")
    assert load(old / "before/verdict.json") == was


def test_a_second_sweep_keeps_every_cell(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    was = load(old / "before/verdict.json")
    written = {file: file.stat().st_mtime_ns for file in (old / "before").glob("*/**/*")}
    assert main(["sweep", str(old / "sweep.yaml"), f"output={old / 'before'}"]) == 0
    assert {file: file.stat().st_mtime_ns for file in (old / "before").glob("*/**/*")} == written
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith(tuple(CELLS))] == ["complete"] * 4
    assert load(old / "before/verdict.json") == was


def test_cells_are_told_apart_or_not_as_they_were(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = old / "before"
    assert main(["diff", str(cells / "tree-tp1"), str(cells / "tree-tp2")]) == 0
    assert capsys.readouterr().out.endswith("\nidentical\n")
    assert main(["diff", str(cells / "stock-tp1"), str(cells / "tree-tp1")]) == 1
    assert "\nstep 1 " in capsys.readouterr().out


def test_the_stopped_run_goes_on_at_another_tp(old: Path) -> None:
    path = old / "stopped"
    before = result_dir.read_steps(path)
    overrides = [f"output={path}", "tp=1", "stop_after=null", "trace=null"]  # a trace begins with its run
    assert main(["train", str(old / "run.yaml"), "--resume", *overrides]) == 0
    steps = result_dir.read_steps(path)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[:2] == before
    assert [past["until_step"] for past in load(path / "manifest.json")["history"]] == [2]
    if is_the_machine_of(old / "traced"):
        assert digests(path) == digests(old / "traced")
    else:
        assert result_dir.final_digests(path, 4)


def test_traces_are_compared_as_they_were(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(old / "traced"), str(old / "stopped"), "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "\ntensors  126 identical\n" in out  # 115, and what the step moved 11 parameters by
    assert out.endswith("\nidentical: every tensor that has been compared, bit for bit\n")

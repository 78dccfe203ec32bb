"""`tpcheck sweep` end to end: real cells through submitit's local executor, and what it says when things go wrong."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT
from tests.support.finished import begin, finish, sweep, sweep_file
from tests.support.waiting import wait_for
from tpcheck.cli import main
from tpcheck.files import result_dir
from tpcheck.files.lock import is_locked
from tpcheck.files.names import DIGESTS, MANIFEST
from tpcheck.sweep import local
from tpcheck.sweep.completeness import other_settings
from tpcheck.sweep.jobs import Machine

QUICK = {"model": "qwen3-tiny", "steps": 2, "seq_length": 20}
STOCK = {"strategy": ["stock"], "tp": [1, 2]}


def start(path: Path, *overrides: str) -> subprocess.Popen[str]:
    """`tpcheck sweep`, as from a terminal: a shell makes what it starts in the background deaf to SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "tpcheck", "sweep", str(path), *overrides],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)


def ranks(sweep_process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train: the children of `tpcheck train`."""
    below = psutil.Process(sweep_process.pid).children(recursive=True)
    trainers = [process for process in below if process.cmdline()[1:4] == ["-m", "tpcheck", "train"]]
    return [process for process in trainers if any(process.ppid() == other.pid for other in trainers)]


def test_cells_are_trained_compared_and_never_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = sweep_file(tmp_path, base=QUICK, matrix=STOCK), tmp_path / "out"
    assert main(["sweep", str(path)]) == 0
    assert "2 of 2: TP=1, 2" in capsys.readouterr().out
    assert [group["status"] for group in json.loads((out / "verdict.json").read_text())["groups"]] == ["different"]
    assert (out / "loss.png").exists()
    assert (out / "index.html").exists()
    assert not (out / "jobs").exists()
    assert not is_locked(out / "stock-tp2" / ".lock")

    written = {file: file.stat().st_mtime_ns for file in out.glob("stock-*/*")}
    assert main(["sweep", str(path)]) == 0
    assert {file: file.stat().st_mtime_ns for file in out.glob("stock-*/*")} == written
    assert "running" not in capsys.readouterr().out


def test_a_cell_that_cannot_start_is_named_with_the_reason_and_the_others_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("to train, or not to train\n" * 500)
    data = {"data.path": [f"{tmp_path}/missing", f"{tmp_path}/text"]}
    path = sweep_file(tmp_path, base={**QUICK, "strategy": "stock", "data": {"kind": "text"}}, matrix=data)
    assert main(["sweep", str(path)]) == 2
    out = capsys.readouterr().out
    name = f"{tmp_path}/missing".strip("/").replace("/", "_")
    assert f"cell {name} failed: data.path={tmp_path}/missing does not exist\n" in out
    assert "the end of" not in out
    assert f"missing: {name}\n" in out
    assert (tmp_path / "out" / f"{tmp_path}/text".strip("/").replace("/", "_") / DIGESTS).exists()


def test_a_rank_that_is_killed_ends_its_cell_which_is_named_with_the_reason(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, base={**QUICK, "steps": 5000}, matrix={"strategy": ["stock"], "tp": [2]})
    process = start(path)
    wait_for((tmp_path / "out/stock-tp2/steps.jsonl").exists)
    ranks(process)[1].kill()
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 2
    assert "cell stock-tp2 failed: rank 1 was killed by SIGKILL" in out
    assert f"the end of {tmp_path}/out/stock-tp2/log.txt" in out
    assert "  | [launch] rank 1 was killed by SIGKILL" in out


def test_ctrl_c_saves_ends_every_process_and_the_next_call_goes_on_from_there(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, base={**QUICK, "steps": 100}, matrix={"strategy": ["stock"], "tp": [1]})
    cell = tmp_path / "out/stock-tp1"
    process = start(path)
    wait_for((cell / "steps.jsonl").exists)
    processes = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: every process that has not left the group
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "stopped" in out
    assert psutil.wait_procs(processes, timeout=5)[1] == []
    (step, _), *_ = result_dir.checkpoints(cell)
    assert 0 < step < 100

    process = start(path)
    assert process.wait(timeout=120) == 0
    assert [record["step"] for record in result_dir.read_steps(cell)] == list(range(1, 101))
    assert json.loads((cell / MANIFEST).read_text())["history"][0]["until_step"] == step


def test_a_broken_promise_gives_exit_code_1_and_names_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cell in sweep(tmp_path).cells:
        tp2 = cell.name == "tree-tp2"
        finish(cell, (3.0, 2.5, 1.0) if tp2 else (3.0, 2.0, 1.0), model="cc" * 32 if tp2 else "aa" * 32)
    assert main(["sweep", str(tmp_path / "s.yaml")]) == 1
    out = capsys.readouterr().out
    assert "tree: tree-tp1 and tree-tp2 differ\n" in out
    assert "  step 2 " in out
    assert "BROKEN: tree" in out


def test_a_cell_made_before_a_setting_existed_had_its_default(tmp_path: Path) -> None:
    of = sweep(tmp_path, matrix=STOCK)
    before = of.cells[0].config.model_dump(mode="json", exclude={"symmetric_memory", "attention"})
    assert other_settings(of.cells[0], before) == ""
    reading = of.cells[0].config.model_copy(update={"symmetric_memory": True})
    changed = other_settings(dataclasses.replace(of.cells[0], config=reading), before)
    assert changed == "symmetric_memory: False there, True now"


def test_the_memory_of_a_cell_is_that_of_all_its_ranks_whose_optimizer_may_be_shared_out(tmp_path: Path) -> None:
    large = {"model": "qwen3-0.6b", "seq_length": 20, "micro_batch_size": 1, "strategy": "stock"}
    cells = sweep(tmp_path, base=large, matrix={"dp": [1, 4], "distributed_optimizer": [False, True]}).cells
    machine = Machine(cpus=8, gpus=(), memory_gib=64)
    one, _, copies, shared = (local._task(cell, machine).resources.memory_gib for cell in cells)
    assert copies == pytest.approx(4 * one)
    assert copies - shared == pytest.approx(4 * 0.596e9 * (18 - 9) / 2**30, rel=0.01)


def test_a_cell_made_with_other_settings_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(sweep(tmp_path, matrix=STOCK).cells[1])
    assert main(["sweep", str(tmp_path / "s.yaml"), "seed=7"]) == 2
    error = capsys.readouterr().err
    assert "stock-tp2 was made with other settings (seed: 1234 there, 7 now): remove it, or add output=DIR" in error
    assert not (tmp_path / "out/stock-tp1").exists()


def test_a_second_sweep_of_the_same_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sweep_file(tmp_path, matrix=STOCK)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["sweep", str(path)]) == 2
    assert "another sweep writes to" in capsys.readouterr().err


def test_a_cell_that_another_process_runs_is_not_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = sweep(tmp_path, matrix=STOCK).cells[0]
    cell.path.mkdir(parents=True)
    with (cell.path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["sweep", str(tmp_path / "s.yaml")]) == 2
    assert "cell stock-tp1 is being run by another process" in capsys.readouterr().err


@pytest.mark.skipif(os.environ.get("CUDA_VISIBLE_DEVICES") is not None, reason="sets CUDA_VISIBLE_DEVICES itself")
def test_a_cell_that_needs_more_gpus_than_there_are_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert main(["sweep", str(sweep_file(tmp_path, matrix=STOCK))]) == 2
    assert "cell stock-tp2 needs 2 GPUs, this machine has 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "name: x\nbase: {}\nmatrix: {tp: []}\n", "name: x\nbase: {}\nmatrix: {tq: [1]}\n"]
)
def test_a_bad_sweep_file_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["sweep", str(tmp_path / "bad.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tpcheck: error: ")
    assert error.count("\n") == 1

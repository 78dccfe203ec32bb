"""Jobs on this machine: how many at once, what survives whom, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.waiting import wait_for
from tpcheck.errors import TpcheckError
from tpcheck.files.lock import is_locked
from tpcheck.sweep.jobs import Job, LocalRunner, Machine, Resources, Task, visible_gpus

SMALL = Resources(cpus=1, gpus=0, memory_gib=0.1)
ONE_CPU = Machine(cpus=1, gpus=(), memory_gib=8)
TWO_CPUS = Machine(cpus=2, gpus=(), memory_gib=8)


def task(folder: Path, name: str, script: str, resources: Resources = SMALL) -> Task:
    folder.mkdir(exist_ok=True)
    return Task(name, ("sh", "-c", script), folder / f"{name}.lock", resources)


def run_all(runner: LocalRunner, tasks: list[Task]) -> dict[str, Job]:
    return {job.task.name: job for job in runner.run(tasks, lambda job: None) if job}


def test_every_task_ends_with_its_own_exit_code_and_output(tmp_path: Path) -> None:
    tasks = [task(tmp_path, "good", "echo fine"), task(tmp_path, "lr0.5-bad", "echo broken >&2; exit 7")]
    jobs = run_all(LocalRunner(tmp_path / "jobs", TWO_CPUS), tasks)
    assert {name: job.exit_code for name, job in jobs.items()} == {"good": 0, "lr0.5-bad": 7}
    assert "fine" in jobs["good"].output()
    assert "broken" in jobs["lr0.5-bad"].output()


def test_no_more_tasks_run_at_once_than_there_are_cpus(tmp_path: Path) -> None:
    note = f"echo + >> {tmp_path}/log; sleep 0.5; echo - >> {tmp_path}/log"
    tasks = [task(tmp_path, f"t{number}", note) for number in range(3)]
    run_all(LocalRunner(tmp_path / "jobs", ONE_CPU), tasks)
    assert (tmp_path / "log").read_text().split() == ["+", "-"] * 3


def test_a_task_larger_than_the_machine_runs_alone() -> None:
    large = Resources(cpus=8, gpus=0, memory_gib=100)
    assert ONE_CPU.fits(large, [])
    assert not ONE_CPU.fits(large, [SMALL])
    assert not ONE_CPU.fits(SMALL, [large])


def test_a_small_task_starts_before_a_large_one_that_has_to_wait(tmp_path: Path) -> None:
    large = Resources(cpus=2, gpus=0, memory_gib=0.1)
    tasks = [
        task(tmp_path, "first", "sleep 1"),
        task(tmp_path, "large", f"echo large >> {tmp_path}/log", large),
        task(tmp_path, "small", f"echo small >> {tmp_path}/log"),
    ]
    run_all(LocalRunner(tmp_path / "jobs", TWO_CPUS), tasks)
    assert (tmp_path / "log").read_text().split() == ["small", "large"]


def test_memory_limits_how_many_run_at_once() -> None:
    resources = Resources(cpus=1, gpus=0, memory_gib=5)
    assert not TWO_CPUS.fits(resources, [resources])


def test_every_job_gets_gpus_of_its_own(tmp_path: Path) -> None:
    resources = Resources(cpus=1, gpus=1, memory_gib=0.1)
    machine = Machine(cpus=8, gpus=(3, 5), memory_gib=8)
    tasks = [task(tmp_path, name, "echo gpu=$CUDA_VISIBLE_DEVICES; sleep 1", resources) for name in "ab"]
    jobs = run_all(LocalRunner(tmp_path / "jobs", machine), tasks)
    assert "gpu=3" in jobs["a"].output()
    assert "gpu=5" in jobs["b"].output()


def test_gpus_that_are_not_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert visible_gpus() == (0, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    with pytest.raises(TpcheckError, match="by number"):
        visible_gpus()


def running(tmp_path: Path, script: str) -> tuple[LocalRunner, Iterator[Job | None]]:
    """A runner of `script`, which has made the file `ready`, and its looks at the clock."""
    runner = LocalRunner(tmp_path / "jobs", ONE_CPU)
    jobs = runner.run([task(tmp_path, "t", script)], lambda job: None)
    wait_for(lambda: next(jobs) or (tmp_path / "ready").exists())
    return runner, jobs


def test_stop_asks_politely_and_waits_for_the_answer(tmp_path: Path) -> None:
    script = f"trap 'echo saved > {tmp_path}/saved; exit 0' TERM; touch {tmp_path}/ready; while :; do sleep 0.1; done"
    runner, _ = running(tmp_path, script)
    runner.stop(grace=20)
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert not is_locked(tmp_path / "t.lock")


def test_stop_kills_what_does_not_answer_with_all_its_children(tmp_path: Path) -> None:
    script = f"trap '' TERM; (while :; do sleep 0.1; done) & touch {tmp_path}/ready; wait"
    runner, _ = running(tmp_path, script)
    runner.stop(grace=1)
    wait_for(lambda: not is_locked(tmp_path / "t.lock"), 5)


def test_a_cell_counts_as_running_after_its_sweep_was_killed(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from tpcheck.sweep.jobs import LocalRunner, Machine, Resources, Task
folder = Path({str(tmp_path)!r})
task = Task("t", ("sh", "-c", f"touch {{folder}}/ready; sleep 4"), folder / "t.lock", Resources(1, 0, 0.1))
list(LocalRunner(folder / "jobs", Machine(1, (), 8)).run([task], lambda job: None))
"""
    sweep = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_for((tmp_path / "ready").exists)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    assert is_locked(tmp_path / "t.lock")
    wait_for(lambda: not is_locked(tmp_path / "t.lock"))


def test_two_jobs_cannot_run_the_same_cell(tmp_path: Path) -> None:
    first, second = task(tmp_path, "t", "sleep 3"), task(tmp_path, "t", f"touch {tmp_path}/twice")
    runners = [LocalRunner(tmp_path / name, ONE_CPU) for name in ("a", "b")]
    thread = threading.Thread(target=run_all, args=(runners[0], [first]))
    thread.start()
    wait_for(lambda: runners[0].running and runners[0].running[0].pid)
    jobs = run_all(runners[1], [second])
    thread.join()
    assert jobs["t"].exit_code is None
    assert not (tmp_path / "twice").exists()


def test_ctrl_c_in_a_terminal_leaves_it_to_the_sweep_what_becomes_of_a_cell(tmp_path: Path) -> None:
    script = f"trap 'touch {tmp_path}/interrupted' INT; touch {tmp_path}/ready; sleep 3; touch {tmp_path}/done"
    runner, jobs = running(tmp_path, script)
    os.kill(int(runner.running[0].submitted.job_id), signal.SIGINT)  # the whole foreground group hears Ctrl-C
    ended = [job for job in jobs if job]
    assert [job.task.name for job in ended] == ["t"]
    assert (tmp_path / "done").exists()
    assert not (tmp_path / "interrupted").exists()

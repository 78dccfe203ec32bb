"""What happens to jobs on a cluster, for real: the cell goes on, and its digests are as if nothing had been."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slurm import submissions
from tests.slurm.real.case import CELL, STEPS, Case, need_node_names, together
from tests.support.waiting import wait_for
from tpcheck.files import result_dir
from tpcheck.files.names import DIGESTS

CHECKPOINTS = {6, 12, 18}  # of a cell that is not asked to save
SOON = 120.0  # seconds for what Slurm or a cell does at once, on a machine that is busy


@together
def test_a_cell_that_reaches_its_time_limit_saves_queues_again_and_goes_on(case: Case) -> list[str]:
    case.write(time="00:01:00", save_before_end=30)
    with case.slowed(CELL, seconds=6):  # too slow for one minute
        case.submit()
        case.wait_for_attempt(CELL, 2)
    case.wait_until_complete(CELL)
    assert len(case.jobs(CELL)) == 1
    return [CELL]


@together
def test_a_node_that_loses_its_power_costs_the_steps_since_the_last_checkpoint(case: Case) -> list[str]:
    case.write(sbatch={"exclude": "h1"})
    with case.slowed(CELL):
        case.submit()
        case.wait_for_step(CELL, 7)
        case.cluster.fail("h2")
        wait_for(lambda: not case.ranks(CELL), SOON, "the ranks on h2 to be gone")
    # Slurm misses it after SlurmdTimeout, and gives the cell to the node again once it is back.
    wait_for(lambda: "down" in case.cluster.run("sinfo", "-h", "-n", "h2", "-o", "%T"), SOON, "h2 to be missed")
    case.cluster.start_slurmd("h2")
    case.wait_until_complete(CELL)
    # Slurm may still be delivering the end of the first start, and so end the second one.
    assert set(resumed_from(case)) <= CHECKPOINTS
    return [CELL]


@together
def test_a_slurmd_that_dies_alone_and_comes_back_costs_nothing(case: Case) -> list[str]:
    case.write(sbatch={"exclude": "h1"})
    with case.slowed(CELL):
        case.submit()
        case.wait_for_step(CELL, 2)
        case.cluster.kill_slurmd("h2")
        case.wait_for_step(CELL, 4)
        case.cluster.start_slurmd("h2")
    case.wait_until_complete(CELL)
    assert case.attempts(CELL) == 1
    return [CELL]


@together
def test_a_preempted_cell_saves_and_goes_on_when_the_other_job_has_ended(case: Case) -> list[str]:
    matrix = {"strategy": ["tree"], "tp": [1], "arch": ["b300"]}
    case.write(matrix, partition="scavenge", sbatch={"exclude": "b1"})
    cell = "tree-tp1-b300"
    with case.slowed(cell, seconds=3):  # or it may be complete before the other job is there
        case.submit()
        case.wait_for_step(cell, 2)
        other = ["sbatch", "--parsable", "--partition=b300", "--nodelist=b2", "--exclusive", "--output=/dev/null"]
        high = case.cluster.run(*other, "--job-name=urgent", "--wrap=sleep 2")
        wait_for(lambda: case.cluster.run("squeue", "-h", "-j", high, "-o", "%T") != "PENDING", SOON, "preemption")
    case.wait_until_complete(cell)
    assert case.attempts(cell) == 2
    return [cell]


@together
def test_scancel_with_usr2_saves_at_the_next_step_and_the_cell_goes_on_from_there(case: Case) -> list[str]:
    case.write()
    with case.slowed(CELL):
        case.submit()
        case.wait_for_step(CELL, 2)
        case.cluster.run("scancel", "--full", "--signal=USR2", case.jobs(CELL)[0])  # the script as well
        case.wait_for_attempt(CELL, 2)
    case.wait_until_complete(CELL)
    (step,) = resumed_from(case)
    assert 2 <= step < STEPS
    return [CELL]


@together
def test_usr2_reaches_the_ranks_below_torchrun_on_two_nodes(case: Case) -> list[str]:
    need_node_names()
    case.write({"strategy": ["tree"], "tp": [2], "arch": ["b300"]}, launcher="torchrun")
    cell = "tree-tp2-b300"
    with case.slowed(cell):
        case.submit()
        case.wait_for_step(cell, 2)
        case.cluster.run("scancel", "--signal=USR2", case.jobs(cell)[0])
        case.wait_for_attempt(cell, 2)
    case.wait_until_complete(cell)
    (step,) = resumed_from(case, cell)
    assert 2 <= step < STEPS
    return [cell]


@together
def test_a_killed_rank_takes_its_cell_down_and_both_ranks_come_back(case: Case) -> list[str]:
    need_node_names()
    case.write({"strategy": ["tree"], "tp": [2], "arch": ["h100"]})
    cell = "tree-tp2-h100"
    with case.slowed(cell):
        case.submit()
        case.wait_for_step(cell, 7)
        case.ranks(cell)[1].kill()
        case.wait_for_attempt(cell, 2)
    case.wait_until_complete(cell)
    assert set(resumed_from(case, cell)) <= CHECKPOINTS
    return [cell]


@together
def test_a_stopped_rank_keeps_its_cell_neither_from_answering_term_nor_from_going_on(case: Case) -> list[str]:
    need_node_names()
    case.write({"strategy": ["tree"], "tp": [2], "arch": ["h100"]})
    cell = "tree-tp2-h100"
    with case.slowed(cell):
        case.submit()
        case.wait_for_step(cell, 2)
        case.ranks(cell)[1].suspend()
    case.cluster.run("scancel", "--signal=TERM", case.jobs(cell)[0])
    case.wait_for_attempt(cell, 2)
    case.wait_until_complete(cell)
    assert re.search("SIGTERM came|no sign of life", (case.out / cell / "log.txt").read_text())
    return [cell]


@together
def test_a_controller_that_is_down_when_a_cell_wants_to_queue_again_is_waited_for(case: Case) -> list[str]:
    case.write()
    with case.slowed(CELL):
        case.submit()
        case.wait_for_step(CELL, 2)
        case.cluster.kill_controller()
        for rank in case.ranks(CELL):
            rank.send_signal(signal.SIGUSR2)
        wait_for(lambda: not case.ranks(CELL), SOON, "the cell to save and leave")
    try:
        out = case.tpcheck("status", str(case.out)).stdout
        assert "unknown" in out
        assert "nothing is known" in out
        assert "does not answer" in case.try_to_submit().stderr
    finally:
        case.cluster.start_controller()
    case.wait_until_complete(CELL)
    assert len(case.jobs(CELL)) == 1
    return [CELL]


@together
def test_a_submission_interrupted_half_way_is_finished_by_the_next_one_and_nothing_is_submitted_twice(
    case: Case,
) -> list[str]:
    case.write({"strategy": ["tree"], "tp": [1], "arch": ["h100", "b300"]}, sbatch={"begin": "now+1hour"})
    real = subprocess.check_output(["sh", "-c", "command -v sbatch"], text=True).strip()

    before = _sbatch(case.folder / "before", 'kill -9 "$PPID"')
    assert case.try_to_submit(path=before).returncode == -signal.SIGKILL
    assert _queued(case) == []

    after = _sbatch(case.folder / "after", f'{real} "$@"; kill -9 "$PPID"')
    assert case.try_to_submit(path=after).returncode == -signal.SIGKILL
    assert len(_queued(case)) == 1  # Slurm has the first job, and nobody wrote down its number

    case.submit()
    assert sorted(_queued(case)) == sorted(job for cell in (CELL, "tree-tp1-b300") for job in case.jobs(cell))
    assert len(_queued(case)) == 2
    case.submit()
    assert len(_queued(case)) == 2

    for job in _queued(case):
        case.cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")
    for cell in (CELL, "tree-tp1-b300"):
        case.wait_until_complete(cell)
    return [CELL, "tree-tp1-b300"]


@together
def test_a_full_disk_fails_the_cell_and_with_room_again_it_goes_on_from_its_last_checkpoint(case: Case) -> list[str]:
    case.write()
    with _small_disk(case.out):
        with case.slowed(CELL):
            case.submit()
            case.wait_for_step(CELL, 7)
            _fill(case.out / "filler")
            wait_for(lambda: not case.ranks(CELL), SOON, "the cell to fail")
        wait_for(lambda: "failed" in case.tpcheck("status", str(case.out)).stdout, SOON, "status to say so")
        assert "No space left on device" in case.tpcheck("status", str(case.out)).stdout
        assert case.attempts(CELL) == 1
        (case.out / "filler").unlink()
        case.submit("--wait")
        assert len(resumed_from(case)) == 1 and set(resumed_from(case)) <= CHECKPOINTS
        found = (case.out / CELL / DIGESTS).read_bytes()
    (case.out / CELL).mkdir(parents=True)  # below the disk that was taken away
    (case.out / CELL / DIGESTS).write_bytes(found)
    return [CELL]


@together
def test_cancelled_cells_are_not_queued_again_whoever_cancels_them(case: Case) -> list[str]:
    case.write({"strategy": ["tree"], "tp": [1], "seed": [1, 2, 3], "arch": ["h100"]}, throttle=2)
    first, second, third = (f"tree-tp1-seed{seed}-h100" for seed in (1, 2, 3))
    with case.slowed(first, seconds=4), case.slowed(second, seconds=4):
        case.submit()
        case.wait_for_step(first, 1)
        case.wait_for_step(second, 1)
        assert "cancelled tree-tp1-seed3" in case.tpcheck("cancel", str(case.out), third).stdout
        case.cluster.run("scancel", case.jobs(first)[0])
        assert "cancelled tree-tp1-seed2" in case.tpcheck("cancel", str(case.out)).stdout
        ended = "squeue -h -t PD,R,CG,CF -o %i -j".split()
        wait_for(lambda: not case.cluster.run(*ended, case.jobs(first)[0].partition("_")[0]), SOON, "all to be gone")
    rows = case.tpcheck("status", str(case.out)).stdout
    assert rows.count("cancelled") == 3
    assert [case.attempts(cell) for cell in (first, second, third)] == [1, 1, 0]
    return []


def resumed_from(case: Case, cell: str = CELL) -> list[int]:
    """The steps at which the cell was interrupted and gone on with, oldest first."""
    return [part["until_step"] for part in result_dir.read_manifest(case.out / cell)["history"]]


def _queued(case: Case) -> list[str]:
    """What Slurm has of the sweep, whatever was written down."""
    names = ",".join(submission.job_name for submission in submissions.read(case.out))
    return case.cluster.run("squeue", "-h", "-o", "%F", "--name", names).split()


def _sbatch(folder: Path, script: str) -> str:
    """A folder with an sbatch that does `script`."""
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "sbatch").chmod(0o755)
    return str(folder)


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small disk can't be mounted here, which only root may")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _fill(file: Path) -> None:
    """Take all the space that is left on its disk."""
    with file.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(bytes(1 << 20))
        except OSError:
            pass
    with file.open("ab", buffering=0) as out:
        try:
            while True:
                out.write(bytes(1 << 12))
        except OSError:
            return

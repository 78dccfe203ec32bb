"""What a real Slurm makes of our questions and requests: cheap cases on one cluster, whose jobs mostly never start.

Not here: `launch failed requeued held`, for which a node must be broken; tests/slurm/test_status.py has its row.
"""

from __future__ import annotations

import getpass
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import submissions
from tests.slurm.real.case import CELL, Case
from tests.support.slurm_cluster import Cluster
from tests.support.waiting import wait_for
from tpcheck.cli import main

LATER = {"begin": "now+1hour"}
SOON = 60.0  # seconds
ONE = {"strategy": ["tree"], "tp": [1], "arch": ["h100"]}
FIVE = {"strategy": ["tree"], "tp": [1], "seed": [1, 2, 3, 4, 5], "arch": ["h100"]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Slurm with small arrays, accounts, and a quality of service that takes two jobs of a user."""
    limits = ["MaxArraySize=3", "AccountingStorageEnforce=associations,limits,qos"]
    with Cluster(accounting=True, settings=limits) as cluster:
        for words in (
            "add account lab",
            f"add user {getpass.getuser()} account=lab",
            "add qos small set MaxSubmitJobsPerUser=2",
            f"modify user {getpass.getuser()} set qos=normal,small",
        ):
            cluster.run("sacctmgr", "--immediate", *words.split())
        yield cluster


class Here(Case):
    """A case whose commands run in this process, which has imported torch already."""

    def __init__(self, cluster: Cluster, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(cluster, folder)
        self.capsys = capsys

    def call(self, *words: str) -> str:
        """All that the command prints; it must succeed."""
        code, text = self.try_to_call(*words)
        assert code == 0, text
        return text

    def try_to_call(self, *words: str) -> tuple[int, str]:
        self.capsys.readouterr()
        code = main(list(words))
        printed = self.capsys.readouterr()
        return code, printed.out + printed.err

    def sweep(self) -> str:
        return self.call(*self.sweep_words)

    @property
    def sweep_words(self) -> list[str]:
        return ["sweep", str(self.folder / "sweep.yaml"), "--cluster", str(self.folder / "cluster.yaml")]

    def status(self) -> dict[str, str]:
        """The state of every cell in the table, without Slurm's reason, which comes a moment later."""
        return {cell: re.sub(": [^,]*", "", state) for cell, state in self.states().items()}

    def states(self) -> dict[str, str]:
        """What the table says of every cell's state."""
        rows = [line.split("│") for line in self.call("status", str(self.out)).splitlines() if line.startswith("│")]
        return {row[1].strip(): row[3].strip() for row in rows if row[1].strip()}

    def queued(self) -> list[str]:
        """The cells whose jobs Slurm has, one for each job."""
        names = {each.job_name: each.cells for each in submissions.read(self.out)}
        lines = self.cluster.run("squeue", "-h", "-r", "-o", "%j %K", "--name", ",".join(names)).splitlines()
        places = ((name, int(place) if place.isdecimal() else 0) for name, place in map(str.split, lines))
        return sorted(names[name][place] for name, place in places)


@pytest.fixture
def case(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Here]:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.environment[name])
    yield Here(cluster, tmp_path / "s", capsys)
    cluster.run("scancel", "--user", getpass.getuser())


def five(*but: int) -> list[str]:
    return [f"tree-tp1-seed{seed}-h100" for seed in range(1, 6) if seed not in but]


def test_arrays_are_split_where_slurm_takes_small_ones_only(case: Here) -> None:
    case.write(FIVE, sbatch=LATER)
    case.sweep()
    assert [len(each.cells) for each in submissions.read(case.out)] == [3, 2]
    case.sweep()
    assert case.queued() == five()
    assert case.status() == dict.fromkeys(five(), "pending")


def test_of_two_sweeps_at_once_every_cell_is_submitted_once(case: Here) -> None:
    case.write(FIVE, sbatch=LATER)
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(2)
    calls = [fork.Process(target=lambda: (together.wait(), sys.exit(main(case.sweep_words)))) for _ in range(2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join(SOON)
    assert {call.exitcode for call in calls} <= {0, 2}  # 2: the other one holds the lock
    assert case.queued() == five()


def test_options_in_the_users_environment_change_no_answer(case: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    case.write(FIVE, sbatch=LATER)
    case.sweep()
    for name in "SQUEUE_PARTITION SQUEUE_USERS SACCT_FORMAT SCANCEL_STATE SCANCEL_PARTITION SLURM_CLUSTERS".split():
        monkeypatch.setenv(name, "scavenge")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert "5 are pending or running" in case.sweep()
    assert set(case.status()) == set(five())
    case.call("cancel", str(case.out), *five(1))
    monkeypatch.delenv("SQUEUE_PARTITION")
    monkeypatch.delenv("SQUEUE_USERS")
    monkeypatch.delenv("SLURM_CLUSTERS")
    assert case.queued() == five(2, 3, 4, 5)


def test_lines_that_a_sites_wrappers_print_change_nothing(case: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "squeue", "sacct", "scancel", "scontrol"):
        real = case.cluster.run("sh", "-c", f"command -v {name}")
        program = case.folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "job 7 | is | good | for | you | all"\n{real} "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{case.folder}/bin", prepend=":")
    case.write(ONE, sbatch=LATER)
    case.sweep()
    assert "1 are pending" in case.sweep()
    assert case.queued() == [CELL] and case.status() == {CELL: "pending"}
    assert case.jobs(CELL) == case.cluster.run("squeue", "-h", "-o", "%i").split()
    assert f"cancelled {CELL}" in case.call("cancel", str(case.out))
    assert case.status() == {CELL: "cancelled"}


def test_a_cancelled_cell_is_submitted_again_when_asked_for(case: Here) -> None:
    case.write(FIVE, sbatch=LATER)
    case.sweep()
    one, *others = five()
    assert f"cancelled {one}" in case.call("cancel", str(case.out), one)
    assert case.status() == {one: "cancelled", **dict.fromkeys(others, "pending")}
    assert "nothing to cancel" in case.call("cancel", str(case.out), one)
    case.sweep()
    assert case.queued() == five()
    case.call("cancel", str(case.out))
    assert set(case.status().values()) == {"cancelled"} and case.queued() == []


def test_a_sweep_file_that_is_edited_between_calls(case: Here) -> None:
    case.write(FIVE, sbatch=LATER)
    case.sweep()
    case.write({**FIVE, "seed": [1, 2]}, sbatch=LATER)
    assert "no longer in the sweep: tree-tp1-seed3-h100, tree-tp1-seed4-h100, tree-tp1-seed5-h100" in case.sweep()
    assert case.status()["tree-tp1-seed5-h100"] == "pending, not in the sweep"
    case.call("cancel", str(case.out), *five(1, 2))
    assert set(case.status()) == set(five(3, 4, 5))
    code, text = case.try_to_call(*case.sweep_words, "steps=5")
    assert code == 2 and "steps: 24 there, 5 now" in text
    assert f"tpcheck cancel {case.out} tree-tp1-seed1-h100" in text
    case.call("cancel", str(case.out))
    case.call(*case.sweep_words, "steps=5")
    assert case.queued() == five(3, 4, 5)


def test_a_limit_of_jobs_is_told_in_slurms_words_and_what_was_refused_can_be_submitted_later(case: Here) -> None:
    case.write(FIVE, qos="small", sbatch=LATER)
    code, text = case.try_to_call(*case.sweep_words)
    assert code == 2 and "sbatch refuses tree-tp1-seed1-h100" in text and "MaxSubmitJobPerUser" in text
    assert case.queued() == [] and set(case.status().values()) == {"missing"}
    case.write(FIVE, sbatch=LATER)
    case.sweep()
    assert case.queued() == five()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("scontrol hold {job}", "JobHeld"),
        ("scontrol update partitionname=h100 state=down", "PartitionDown"),
    ],
    ids=["held", "down"],
)
def test_why_a_job_does_not_start_is_shown(case: Here, command: str, reason: str) -> None:
    case.write(ONE, partition="h100", sbatch={"nodelist": "h1", "exclusive": "user", **LATER})
    case.sweep()
    try:
        case.cluster.run(*command.format(job=case.jobs(CELL)[0]).split())
        case.cluster.run("scontrol", "update", f"jobid={case.jobs(CELL)[0]}", "starttime=now")
        wait_for(lambda: case.states()[CELL].startswith(f"pending: {reason}"), SOON, reason)
    finally:
        case.call("cancel", str(case.out))
        case.cluster.run("scontrol", "update", "partitionname=h100", "state=up")


def test_a_cancellation_that_slurm_refuses_leaves_no_mark(case: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid():
        pytest.skip("only root can ask as somebody else")
    real = case.cluster.run("sh", "-c", "command -v scancel")
    (case.folder / "bin").mkdir()
    (case.folder / "bin/scancel").write_text(f'#!/bin/sh\nexec setpriv --reuid 65534 --clear-groups {real} "$@"\n')
    (case.folder / "bin/scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{case.folder}/bin", prepend=":")
    case.write(FIVE, sbatch=LATER)
    case.sweep()
    code, text = case.try_to_call("cancel", str(case.out))
    assert code == 2 and "denied" in text and all(f"{cell} (job " in text for cell in five())
    assert not list(case.out.rglob("cancelled")) and case.queued() == five()


def test_paths_with_spaces_behind_a_link_and_a_python_that_is_not_there(case: Here) -> None:
    elsewhere = case.folder / 'a disk\'s "results" $HOME'
    elsewhere.mkdir()
    (case.folder / "my results").symlink_to(elsewhere)
    case.out = case.folder / "my results" / "x; y"
    case.write(ONE, python="/no/such/python")
    case.sweep()
    wait_for(lambda: case.status()[CELL] == "failed", SOON, "the job to fail")
    assert "error: execve(): /no/such/python: No such file or directory; see" in case.call("status", str(case.out))
    assert case.attempts(CELL) == 1
    assert len(list(elsewhere.glob("x; y/slurm/*/*_log.out"))) == 1


def test_usr2_to_a_batch_script_is_its_ranks_to_hear_and_the_job_is_queued_again(case: Here) -> None:
    rank = 'trap "exit 0" USR2; touch "${2%/*}/up"; while :; do sleep 0.1; done'
    case.write({**FIVE, "seed": [1, 2]}, python=["bash", "-c", rank])
    case.sweep()
    cells = five(3, 4, 5)
    wait_for(lambda: all((case.out / cell / "up").exists() for cell in cells), SOON, "the ranks to be there")
    for cell, option in zip(cells, ("--full", "--batch"), strict=True):
        case.cluster.run("scancel", option, "--signal=USR2", case.jobs(cell)[0])
    for cell in cells:
        case.wait_for_attempt(cell, 2)
    case.call("cancel", str(case.out))

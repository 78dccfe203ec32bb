"""What Slurm knows of jobs: squeue, then sacct, whatever else they print and the user's shell exports."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from slurm.queue import JobState, job_states
from tests.support.slurm_answers import NAME, say, submission
from tpcheck.cli import main
from tpcheck.errors import TpcheckError
from tpcheck.sweep.spec import Sweep


def test_squeue_tells_of_plain_jobs_and_of_array_elements(slurm: Path) -> None:
    say(
        slurm,
        "squeue",
        f"{NAME}|77|2|PENDING||JobArrayTaskLimit\n{NAME}|77|0|RUNNING|h[1-2]|None\ns.x|80|N/A|FAILED|b1|a|b\n",
    )
    assert job_states([submission(), dataclasses.replace(submission(("x",)), job_name="s.x")]) == {
        (NAME, 0): JobState("77", "RUNNING", "h[1-2]"),
        (NAME, 2): JobState("77", "PENDING", "", "JobArrayTaskLimit"),
        ("s.x", 0): JobState("80", "FAILED", "b1", "a|b"),
    }


def test_sacct_is_asked_for_what_squeue_has_forgotten_and_its_last_final_record_counts(slurm: Path) -> None:
    say(slurm, "squeue", f"{NAME}|77|0|RUNNING|h1|None\n")
    records = [
        "77_0|2026-02-03T04:05:06|2026-02-03T04:05:07|PREEMPTED|h1",
        "77_1|2026-02-03T04:09:06|2026-02-03T04:09:07|COMPLETED|b1",
        "77_1|2026-02-03T04:05:06|2026-02-03T04:05:07|NODE_FAIL|h2",
        "77_[2-3%4]|2026-02-03T04:05:06|Unknown|CANCELLED by 0|None assigned",
    ]
    say(slurm, "sacct", "".join(f"{NAME}|{record}\n" for record in records))
    assert job_states([submission()]) == {
        (NAME, 0): JobState("77", "RUNNING", "h1"),
        (NAME, 1): JobState("77", "COMPLETED", "b1"),
        (NAME, 2): JobState("77", "CANCELLED"),
        (NAME, 3): JobState("77", "CANCELLED"),
    }
    assert "--starttime 2026-02-0" in (slurm / "sacct.calls").read_text()


def test_arrays_with_gaps_are_read_as_slurm_writes_them(slurm: Path) -> None:
    say(slurm, "sacct", f"{NAME}|77_[0,2-3,6-10:2%4]|2026-02-03T04:05:06|Unknown|CANCELLED by 0|None assigned\n")
    assert sorted(place for _, place in job_states([submission()])) == [0, 2, 3, 6, 8, 10]


def test_sacct_is_not_believed_when_it_says_that_a_job_runs_which_squeue_does_not_know(slurm: Path) -> None:
    say(slurm, "sacct", f"{NAME}|77_0|2026-02-03T04:05:06|2026-02-03T04:05:07|RUNNING|h1\n")
    assert job_states([submission()]) == {}


@pytest.mark.parametrize(
    "banner", ["Welcome to Slurm", "", "a|b", "|||||", "job|77|0|FAILED|h1|None", "x|77_0|a|b|FAILED|c"]
)
def test_lines_about_no_job_of_ours_are_passed_over(slurm: Path, banner: str) -> None:
    say(slurm, "squeue", f"{banner}\n{NAME}|77|0|RUNNING|h1|None\n{banner}\n")
    say(slurm, "sacct", f"{banner}\n{NAME}|77_1|2026-02-03T04:05:06|Unknown|FAILED|h1\n{banner}\n")
    assert job_states([submission()]) == {
        (NAME, 0): JobState("77", "RUNNING", "h1"),
        (NAME, 1): JobState("77", "FAILED", "h1"),
    }


def test_of_two_jobs_with_one_name_the_one_that_may_still_run_counts(slurm: Path) -> None:
    say(slurm, "squeue", f"{NAME}|90|0|RUNNING|h1|None\n{NAME}|77|0|FAILED|h2|None\n")  # a script submitted by hand
    assert job_states([submission(("tree-tp1",))])[NAME, 0].job == "90"


def test_slurms_commands_are_asked_without_the_options_of_the_users_environment(
    submitted: Sweep, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "SQUEUE_PARTITION SACCT_FORMAT SCANCEL_STATE SCONTROL_ALL SLURM_CLUSTERS".split():
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    for name, text in (("squeue", f"{NAME}|77|0|RUNNING|h1|None"), ("sacct", ""), ("scancel", "")):
        heard = f"env | grep -E '^(SQUEUE|SACCT|SCANCEL|SCONTROL|SLURM)_' | sort > {slurm}/{name}.heard"
        (slurm / name).write_text(f"#!/bin/sh\n{heard}\necho '{text}'\n")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    assert main(["cancel", str(submitted.output), "stock-tp1"]) == 0
    for name in ("squeue", "sacct", "scancel"):
        assert (slurm / f"{name}.heard").read_text() == "SLURM_BITSTR_LEN=0\nSLURM_TIME_FORMAT=standard\n"


def test_a_silent_controller_is_asked_again_and_then_is_an_error(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.queue.PAUSE_SECONDS", 0.01)
    say(slurm, "squeue", "Unable to contact slurm controller", code=1)
    heard: list[str] = []
    with pytest.raises(
        TpcheckError, match="squeue does not answer, so nothing is known of the jobs: Unable to contact"
    ):
        job_states([submission()], patience=0.2, waiting=heard.append)
    assert heard[0] == "squeue: Unable to contact slurm controller"
    assert len((slurm / "squeue.calls").read_text().splitlines()) > 2

    def mend(why: str) -> None:
        say(slurm, "squeue", f"{NAME}|77|0|RUNNING|h1|None\n")

    assert job_states([submission()], waiting=mend) == {(NAME, 0): JobState("77", "RUNNING", "h1")}


def test_without_slurm_commands_the_error_says_where_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TpcheckError, match="squeue is not on this machine"):
        job_states([submission()])

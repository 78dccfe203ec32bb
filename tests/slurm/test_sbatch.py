"""What sbatch is given, and what is made of its answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.finished import sweep_file
from tests.support.slurm_site import Site, anonymous


def test_errors_of_sbatch_are_shown_whole(site: Site, capsys: Any) -> None:
    why = "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid\n"
    (site.folder / "error").write_text(why)
    assert site.submit() == 2
    error = capsys.readouterr().err
    assert error == f"tpcheck: error: sbatch refuses stock-tp1, tree-tp1: {' '.join(why.split())}\n"
    (site.folder / "error").unlink()
    assert site.submit() == 0 and len(site.submitted) == 2


def test_what_the_shell_says_to_sbatch_does_not_spoil_the_script(site: Site, monkeypatch: Any) -> None:
    for name in "JOB_NAME CONSTRAINT WAIT OUTPUT DISTRIBUTION CLUSTERS GPUS_PER_TASK SPREAD_JOB EXCLUSIVE".split():
        monkeypatch.setenv(f"SBATCH_{name}", "3")
    for name in "ARRAY_TASK_ID RESTART_COUNT CLUSTERS".split():
        monkeypatch.setenv(f"SLURM_{name}", "3")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")  # of which the profile says nothing
    site.submit()
    assert os.environ["SBATCH_CONSTRAINT"] == "3"
    assert (site.folder / "variables").read_text() == "SBATCH_ACCOUNT=lab\n"


def test_what_slurm_told_a_job_does_not_reach_the_jobs_that_it_submits(site: Site, monkeypatch: Any) -> None:
    for name in ("JOB_ID", "PROCID", "CPU_BIND", "MEM_PER_CPU", "CONF"):
        monkeypatch.setenv(f"SLURM_{name}", "3")
    site.submit()
    assert os.environ["SLURM_PROCID"] == "3"
    assert (site.folder / "variables").read_text() == "SLURM_CONF=3\n"


@pytest.mark.parametrize(
    ("answer", "job"),
    [
        ("Welcome to the site! job 7 is yours\nSubmitted batch job 100\n", "100"),
        ("Submitted batch job 100 on cluster b\n", "100"),
        ("Submitted batch job 7 (dry run)\nSubmitted batch job 100\nSee you, job 8\n", "100"),
    ],
)
def test_of_what_sbatch_prints_its_own_line_counts(site: Site, answer: str, job: str) -> None:
    (site.folder / "answer").write_text(answer)
    assert site.submit() == 0
    assert {each.job for each in site.recorded} == {job}


def test_an_answer_of_sbatch_without_a_job_is_one_line_and_the_job_is_found_by_its_name(
    site: Site, capsys: Any
) -> None:
    (site.folder / "answer").write_text("your job 7 is in good hands\n")
    assert site.submit() == 2
    error = capsys.readouterr().err
    assert "the answer 'your job 7 is in good hands' names no job; call again" in error and error.count("\n") == 1
    site.queue(site.recorded[0], "PENDING")
    (site.folder / "answer").unlink()
    assert site.submit() == 0
    assert [each.job for each in site.recorded] == ["100", "101"]


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("MaxArraySize            = 3", [3, 3, 2]),
        ("MaxArraySize            = 8", [8]),
        ("MaxArraySize            = 1", [1] * 8),
        ("MaxArraySize            = 0", [1] * 8),
        ("nothing of the kind", [8]),
    ],
)
def test_arrays_are_as_large_as_slurm_takes_them(
    site: Site, config: str, sizes: list[int], tmp_path: Path, capsys: Any
) -> None:
    sweep_file(site.folder, matrix={"seed": list(range(8)), "tp": [1]})
    (site.folder / "config").write_text(f"MaxJobCount             = 5\n{config}\n")
    assert site.submit("--dry-run") == 0
    printed = capsys.readouterr().out
    assert site.submit() == 0
    assert [len(each.cells) for each in site.recorded] == sizes
    assert [cell for each in site.recorded for cell in each.cells] == list(site.cells)
    assert ["--array" in text for text in site.submitted] == [size > 1 for size in sizes]
    assert anonymous(printed) == anonymous("".join(f"{text}\n" for text in site.submitted))

"""Submission, with stand-ins for Slurm's commands: what is submitted, what is recorded, what never happens twice."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurm import queue, submissions, submit
from slurm.plan import plan
from slurm.snapshot import Snapshot
from slurm.submissions import Submission
from tests.support import ROOT
from tests.support.finished import begin, finish, sweep_file
from tpcheck.cli import main
from tpcheck.config.load import load_run
from tpcheck.errors import TpcheckError
from tpcheck.files.names import CANCELLED, EXIT_REASONS, SUBMISSIONS
from tpcheck.run import launch
from tpcheck.sweep.spec import Cell, load_sweep

H100 = {"constraint": "h100", "nodes": 2, "ranks_per_node": 2, "memory_gib": 8}
PROFILE = {"time": "0:30:00", "architectures": {"h100": H100}}
STANDINS = {
    "sbatch": 'env | grep -E "^(SBATCH|SLURM)_" >"$FAKE/variables"\n'
    '[ ! -e "$FAKE/error" ] || { cat "$FAKE/error" >&2; exit 1; }\n'
    'number=$(($(ls "$FAKE/submitted" | wc -l) + 100)); cp "$1" "$FAKE/submitted/$number"\n'
    'echo "Submitted batch job $number"',
    "squeue": '[ ! -e "$FAKE/down" ] || { echo "Unable to contact slurm controller" >&2; exit 1; }; cat "$FAKE/queue"',
    "srun": "exit 1",
    "sacct": "echo accounting storage is disabled >&2; exit 1",
}


class Site:
    """A folder with a sweep, a profile, and a Slurm that notes what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.sweep = sweep_file(folder)
        (folder / "cluster.yaml").write_text(yaml.safe_dump(PROFILE))
        (folder / "submitted").mkdir()
        (folder / "queue").touch()
        (folder / "bin").mkdir()
        for name, body in STANDINS.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / "bin" / name).chmod(0o755)

    @property
    def cells(self) -> dict[str, Cell]:
        return {cell.name: cell for cell in load_sweep(self.sweep).cells}

    @property
    def submitted(self) -> list[str]:
        return [path.read_text() for path in sorted((self.folder / "submitted").iterdir())]

    @property
    def recorded(self) -> list[Submission]:
        return submissions.read(self.out)

    def submit(self, *options: str) -> int:
        return main(["sweep", str(self.sweep), "--cluster", str(self.folder / "cluster.yaml"), *options])

    def queue(self, submission: Submission, word: str, job: str = "100") -> None:
        """Let squeue say this of every element of `submission`."""
        lines = [f"{submission.job_name}|{job}|{place}|{word}||None" for place in range(len(submission.cells))]
        (self.folder / "queue").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "job_states", functools.partial(queue.job_states, patience=0))
    return Site(tmp_path)


def test_cells_with_one_allocation_are_one_array_whose_number_is_recorded(site: Site) -> None:
    assert site.submit() == 0
    assert [(each.job, each.cells) for each in site.recorded] == [
        ("100", ("stock-tp1", "tree-tp1")),
        ("101", ("stock-tp2", "tree-tp2")),
    ]
    assert site.recorded[0].element("tree-tp1") == "100_1"
    lines = [json.loads(line) for line in (site.out / SUBMISSIONS).read_text().splitlines()]
    assert [line["job"] for line in lines] == [None, "100", None, "101"]
    assert [line["job_name"] for line in lines[:2]] == [site.recorded[0].job_name] * 2


def test_a_dry_run_prints_what_would_be_submitted_and_writes_nothing(site: Site, capsys: Any) -> None:
    assert site.submit("--dry-run") == 0 and not site.out.exists()
    printed = capsys.readouterr().out
    assert site.submit() == 0
    assert _anonymous(printed) == _anonymous("".join(f"{text}\n" for text in site.submitted))


def _anonymous(text: str) -> str:
    return re.sub(r"\bs\.[0-9a-f]{8}", "s.NAME", text)


def test_a_dry_run_needs_no_slurm(site: Site, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert site.submit("--dry-run") == 0


def test_jobs_unpickle_nothing_and_no_pickle_is_left(site: Site) -> None:
    site.submit()
    assert not list(site.out.rglob("*.pkl"))
    assert not any("submitit.core" in text for text in site.submitted)


def test_a_single_cell_is_a_plain_job(site: Site) -> None:
    for name, cell in site.cells.items():
        if name != "tree-tp2":
            finish(cell)
    assert site.submit() == 0
    [only] = site.recorded
    assert (only.cells, only.element("tree-tp2")) == (("tree-tp2",), "100")
    assert "--array" not in site.submitted[0]


def test_a_job_finds_its_run_wherever_it_starts(site: Site, monkeypatch: Any) -> None:
    monkeypatch.setenv("SOMETHING", "x")
    main(["sweep", str(site.sweep), "--cluster", str(site.folder / "cluster.yaml"), "output=out"])
    assert load_run(site.out / "tree-tp2" / "run.yaml").output == str(site.out / "tree-tp2")
    assert f"--chdir={site.folder}\n" in site.submitted[0]


def test_what_is_pending_or_running_is_not_submitted_again(site: Site, capsys: Any) -> None:
    site.submit()
    first, _ = site.recorded
    site.queue(first, "RUNNING")
    assert site.submit() == 0
    assert [each.cells for each in site.recorded[2:]] == [("stock-tp2", "tree-tp2")]
    assert "0 cells are complete, 2 are pending or running" in capsys.readouterr().out


def test_a_cell_that_something_else_trains_is_left_alone(site: Site, capsys: Any) -> None:
    with launch._exclusively(site.cells["tree-tp2"].config):  # as train.sbatch does
        site.submit()
        main(["status", str(site.out)])
    assert [each.cells for each in site.recorded] == [("stock-tp1", "tree-tp1"), ("stock-tp2",)]
    out = capsys.readouterr().out
    assert "1 are pending or running" in out and re.search(r"tree-tp2 .* running", out)


@pytest.mark.parametrize("word", ["FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "COMPLETED"])
def test_what_has_ended_without_digests_is_submitted_again(site: Site, word: str) -> None:
    site.submit()
    site.queue(site.recorded[0], word)
    site.submit()
    assert len(site.recorded) == 4


def test_complete_cells_are_never_submitted(site: Site, capsys: Any) -> None:
    for cell in site.cells.values():
        finish(cell)
    assert site.submit() == 0 and site.submitted == []
    assert site.submit("--wait") == 0
    assert "HELD: tree" in capsys.readouterr().out


@pytest.mark.parametrize(("queued", "again"), [(True, False), (False, True)])
def test_a_submission_interrupted_after_sbatch_is_found_by_its_name(site: Site, queued: bool, again: bool) -> None:
    cells = tuple(site.cells)
    half = Submission("2026-01-01T00:00:00+00:00", "c", "s.00000000", None, cells, site.out / "slurm")
    site.out.mkdir()
    submissions.record(site.out, half)
    if queued:
        site.queue(half, "PENDING", job="77")
    assert site.submit() == 0
    assert bool(site.submitted) == again
    assert site.recorded[0].job == ("77" if queued else None)


def test_a_slurm_that_does_not_answer_submits_nothing(site: Site, capsys: Any) -> None:
    site.submit()
    (site.folder / "down").touch()
    assert site.submit() == 2
    assert "squeue does not answer" in capsys.readouterr().err
    assert len(site.submitted) == 2


def test_errors_of_sbatch_are_shown_whole(site: Site, capsys: Any) -> None:
    why = "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid\n"
    (site.folder / "error").write_text(why)
    assert site.submit() == 2
    error = capsys.readouterr().err
    assert error == f"tpcheck: error: sbatch refuses stock-tp1, tree-tp1: {' '.join(why.split())}\n"
    (site.folder / "error").unlink()
    assert site.submit() == 0 and len(site.submitted) == 2


@pytest.mark.parametrize("program", ["sbatch", "srun"])
def test_without_slurm_the_way_out_is_named(site: Site, program: str, monkeypatch: Any, capsys: Any) -> None:
    (site.folder / "bin" / program).unlink()
    monkeypatch.setenv("PATH", f"{site.folder}/bin")
    assert site.submit() == 2
    assert f"{program} is not installed here: call from a machine that submits" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--dry-run", "--wait"])
def test_options_about_slurm_need_a_cluster(site: Site, option: str, capsys: Any) -> None:
    assert main(["sweep", str(site.sweep), option]) == 2
    assert f"{option} is about Slurm: add --cluster NAME" in capsys.readouterr().err


def test_what_the_shell_says_to_sbatch_does_not_spoil_the_script(site: Site, monkeypatch: Any) -> None:
    for name in ("SBATCH_JOB_NAME", "SBATCH_CONSTRAINT", "SBATCH_WAIT", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")  # of which the profile says nothing
    site.submit()
    assert os.environ["SBATCH_CONSTRAINT"] == "3"
    assert (site.folder / "variables").read_text() == "SBATCH_ACCOUNT=lab\n"


def test_a_cell_made_with_other_settings_is_refused_before_anything_is_submitted(site: Site, capsys: Any) -> None:
    begin(site.cells["stock-tp1"])
    assert main(["sweep", str(site.sweep), "--cluster", str(site.folder / "cluster.yaml"), "seed=7"]) == 2
    assert "seed: 1234 there, 7 now" in capsys.readouterr().err
    assert site.submitted == []


def test_a_cell_that_is_queued_with_other_settings_is_refused(site: Site, capsys: Any) -> None:
    site.submit()
    planned = (site.out / "sweep.json").read_bytes()
    site.queue(site.recorded[0], "PENDING")
    assert site.submit("seed=7") == 2
    error = capsys.readouterr().err
    assert "cell stock-tp1 is pending or running with other settings (seed: " in error
    assert len(site.submitted) == 2 and (site.out / "sweep.json").read_bytes() == planned


def test_a_cell_that_ends_while_slurm_is_asked_is_not_submitted_again(site: Site, monkeypatch: Any) -> None:
    site.submit()
    site.queue(site.recorded[0], "COMPLETED")

    def ask(*arguments: Any, **options: Any) -> Any:
        for name in site.recorded[0].cells:
            (site.cells[name].path / "run.yaml").unlink()
            site.cells[name].path.rmdir()
            finish(site.cells[name])
        return queue.job_states(*arguments, **options)

    monkeypatch.setattr(submit, "job_states", ask)
    site.submit()
    assert [each.cells for each in site.recorded[2:]] == [("stock-tp2", "tree-tp2")]


def test_a_plan_refuses_what_was_made_with_other_settings(site: Site) -> None:
    finish(site.cells["stock-tp1"])
    with pytest.raises(TpcheckError, match="seed: 1234 there"):
        plan(site.sweep, ["seed=7"])
    assert not (site.out / "sweep.json").exists()


def test_a_mark_of_tpcheck_cancel_goes_when_the_cell_is_submitted_again(site: Site) -> None:
    begin(site.cells["tree-tp1"])
    for name in (CANCELLED, EXIT_REASONS):  # and why the last job ended is no reason of the next one
        (site.cells["tree-tp1"].path / name).touch()
    site.submit()
    assert not any((site.cells["tree-tp1"].path / name).exists() for name in (CANCELLED, EXIT_REASONS))


def test_a_plan_prepares_a_sweep_for_plain_sbatch(site: Site) -> None:
    finish(site.cells["stock-tp1"])
    lines = [shlex.split(line) for line in plan(site.sweep)]
    code = Snapshot.now().place(site.out)
    assert [line[:5] for line in lines] == [
        [f"OUTPUT={site.out}", f"CODE={code}", "sbatch", "--array=1,3", "--ntasks=2"],
        [f"OUTPUT={site.out}", f"CODE={code}", "sbatch", "--array=2", "--ntasks=1"],
    ]
    assert (code / "slurm" / "requeue.sh").is_file()
    assert (site.out / "cells.txt").read_text().split() == list(site.cells)
    assert load_run(site.out / "tree-tp2" / "run.yaml").tp == 2


def test_a_plan_made_in_the_clone_needs_no_copy_of_the_code(site: Site, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    assert {shlex.split(line)[1] for line in plan(site.sweep)} == {"sbatch"}
    assert not (site.out / "code").exists()


def test_jobs_run_the_code_of_the_moment_when_they_were_submitted(site: Site) -> None:
    site.submit()
    place = Snapshot.now().place(site.out)
    assert f" {place} train " in site.submitted[0] and f"\nrequeue={place}/slurm/requeue.sh\n" in site.submitted[0]
    assert (place / "slurm" / "requeue.sh").read_bytes() == (ROOT / "slurm" / "requeue.sh").read_bytes()
    (place / "tpcheck" / "cli.py").write_text(
        "import importlib.util as u\n"
        "def main(): print(*(u.find_spec(name).origin for name in ('tpcheck', 'patches', 'slurm')))\n"
    )
    call = [sys.executable, str(place), "train"]  # from the clone, which has packages of these names, too
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env={}, timeout=60)
    assert done.stdout.split() == [f"{place}/{package}/__init__.py" for package in ("tpcheck", "patches", "slurm")]

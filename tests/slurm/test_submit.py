"""Submission, with stand-ins for Slurm's commands: what is submitted, what is recorded, what never happens twice."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from slurm import queue, submissions, submit
from slurm.snapshot import Snapshot
from slurm.submissions import Submission
from tests.support import ROOT
from tests.support.finished import begin, finish, sweep_file
from tests.support.slurm_site import Site, anonymous
from tpcheck.cli import main
from tpcheck.config.load import load_run
from tpcheck.files import result_dir
from tpcheck.files.names import CANCELLED, EXIT_REASONS, SUBMISSIONS
from tpcheck.run import launch


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
    assert anonymous(printed) == anonymous("".join(f"{text}\n" for text in site.submitted))


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
    assert "1 are pending" in out and re.search(r"tree-tp2 .* running", out)


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
    assert "error: squeue " in capsys.readouterr().err
    assert len(site.submitted) == 2


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


@pytest.mark.parametrize("name", ["SQUEUE_PARTITION", "SQUEUE_USERS", "SQUEUE_SOMETHING_NEW", "SLURM_CLUSTERS"])
def test_what_filters_squeue_in_the_users_shell_hides_no_job(site: Site, name: str, monkeypatch: Any) -> None:
    site.submit()
    site.queue(site.recorded[0], "PENDING")
    monkeypatch.setenv(name, "")
    monkeypatch.setenv(f"{name}_", "x")
    assert site.submit() == 0
    assert [each.cells for each in site.recorded[2:]] == [("stock-tp2", "tree-tp2")]
    assert os.environ[f"{name}_"] == "x"


def test_a_job_of_a_cell_that_the_sweep_has_no_more_is_named(site: Site, capsys: Any) -> None:
    site.submit()
    site.queue(site.recorded[0], "RUNNING")
    sweep_file(site.folder, matrix={"strategy": ["stock"], "tp": [1, 2]})
    assert site.submit() == 0
    assert f"no longer in the sweep: tree-tp1; tpcheck cancel {site.out} ends it" in capsys.readouterr().out
    assert [each.cells for each in site.recorded[2:]] == [("stock-tp2",)]


@pytest.mark.parametrize("output", ["a\\b", "per%cent"])
def test_an_output_that_a_script_cannot_hold_is_refused_before_anything_is_written(
    site: Site, output: str, capsys: Any
) -> None:
    assert site.submit(f"output={output}") == 2
    assert f"path {site.folder}/{output}" in capsys.readouterr().err
    assert site.submitted == [] and not (site.folder / output / "sweep.json").exists()


def test_a_cell_made_with_other_settings_is_refused_before_anything_is_submitted(site: Site, capsys: Any) -> None:
    begin(site.cells["stock-tp1"])
    assert main(["sweep", str(site.sweep), "--cluster", str(site.folder / "cluster.yaml"), "seed=7"]) == 2
    error = capsys.readouterr().err
    assert "stock-tp1 was made" in error and "seed" in error
    assert site.submitted == []


def test_a_cell_that_is_queued_with_other_settings_is_refused(site: Site, capsys: Any) -> None:
    site.submit()
    planned = (site.out / "sweep.json").read_bytes()
    site.queue(site.recorded[0], "PENDING")
    assert site.submit("seed=7") == 2
    error = capsys.readouterr().err
    assert "cell stock-tp1 " in error and "(seed: " in error
    assert len(site.submitted) == 2 and (site.out / "sweep.json").read_bytes() == planned


@pytest.mark.parametrize("submitted", [True, False], ids=["by-a-job", "by-hand"])
def test_a_cell_that_runs_with_other_settings_is_to_be_cancelled_not_removed(
    site: Site, submitted: bool, capsys: Any
) -> None:
    if submitted:
        site.submit()
        site.queue(site.recorded[0], "RUNNING")
    cell = site.cells["stock-tp1"]
    cell.path.mkdir(parents=True, exist_ok=True)
    result_dir.write_manifest(cell.path, {"config": cell.config.model_dump(mode="json")})
    with contextlib.ExitStack() as held:
        if not submitted:
            held.enter_context(launch._exclusively(cell.config))
        before = len(site.submitted)
        assert site.submit("seed=7") == 2
    error = capsys.readouterr().err
    assert "stock-tp1 is pending or running with other settings (seed: 1234 there, 7 now): call tpcheck cancel" in error
    assert len(site.submitted) == before


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


def test_nobody_is_told_to_remove_what_is_being_trained(site: Site, capsys: Any) -> None:
    cell = site.cells["stock-tp1"]
    begin(cell)
    with launch._exclusively(cell.config):
        assert site.submit("--dry-run", "seed=7") == 2
        assert main(["sweep", str(site.sweep), "seed=7"]) == 2
    assert capsys.readouterr().err.count("wait for what is training it, or end that, or add output=DIR") == 2
    assert site.submit("--dry-run", "seed=7") == 2
    assert "remove it" in capsys.readouterr().err


def test_a_mark_of_tpcheck_cancel_goes_when_the_cell_is_submitted_again(site: Site) -> None:
    begin(site.cells["tree-tp1"])
    for name in (CANCELLED, EXIT_REASONS):  # and why the last job ended is no reason of the next one
        (site.cells["tree-tp1"].path / name).touch()
    site.submit()
    assert not any((site.cells["tree-tp1"].path / name).exists() for name in (CANCELLED, EXIT_REASONS))


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

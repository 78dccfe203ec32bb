"""States, status and cancel, with stand-ins for squeue, sacct and scancel that print what a real Slurm printed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from slurm import submissions
from slurm.queue import JobState, job_states
from slurm.status import look
from tests.support.finished import begin, finish, sweep
from tpcheck.cli import main
from tpcheck.errors import TpcheckError
from tpcheck.files.names import ATTEMPTS
from tpcheck.sweep.spec import Sweep
from tpcheck.sweep.stored_spec import write_sweep

NAME = "s.0a1b2c3d"
CELLS = ("stock-tp1", "stock-tp2", "tree-tp1", "tree-tp2")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that comes before everything else; each notes its arguments in `<name>.calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    say(folder, "squeue", "")
    say(folder, "sacct", "Slurm accounting storage is disabled", code=1)
    say(folder, "scancel", "")
    return folder


def say(folder: Path, command: str, text: str, code: int = 0) -> None:
    """Have `command` print `text`, on standard error when it fails."""
    (folder / f"{command}.text").write_text(text)
    to = ">&2" if code else ""
    script = f'#!/bin/sh\necho "$@" >> {folder}/{command}.calls\ncat {folder}/{command}.text {to}\nexit {code}\n'
    (folder / command).write_text(script)
    (folder / command).chmod(0o755)


def submission(
    cells: tuple[str, ...] = CELLS, job: str | None = "77", folder: Path = Path("jobs")
) -> submissions.Submission:
    return submissions.Submission("2026-02-03T04:05:06+00:00", "local", NAME, job, cells, folder)


@pytest.fixture
def submitted(tmp_path: Path) -> Sweep:
    """A sweep of four cells in one array."""
    made = sweep(tmp_path)
    write_sweep(made)
    submissions.record(made.output, submission(folder=tmp_path / "jobs"))
    return made


def attempt(of: Sweep, cell: str, restart: int = 0) -> None:
    line = {"job": "77", "array_index": 0, "restart": restart, "nodes": "h1", "began": "x", "job_name": NAME}
    (of.output / cell).mkdir(exist_ok=True)
    with (of.output / cell / ATTEMPTS).open("a") as file:
        print(json.dumps(line), file=file)


def cell_states(of: Sweep) -> dict[str, str]:
    return {row.cell: row.state for row in look(of)[0]}


def test_squeue_tells_of_plain_jobs_and_of_array_elements(slurm: Path) -> None:
    say(
        slurm,
        "squeue",
        f"{NAME}|77|2|PENDING||JobArrayTaskLimit\n{NAME}|77|0|RUNNING|h[1-2]|None\ns.x|80|N/A|FAILED|b1|a|b\n",
    )
    assert job_states([submission()]) == {
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


def test_sacct_is_not_believed_when_it_says_that_a_job_runs_which_squeue_does_not_know(slurm: Path) -> None:
    say(slurm, "sacct", f"{NAME}|77_0|2026-02-03T04:05:06|2026-02-03T04:05:07|RUNNING|h1\n")
    assert job_states([submission()]) == {}


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


def test_digests_make_a_cell_complete_whatever_slurm_says(submitted: Sweep, slurm: Path) -> None:
    finish(submitted.cells[0])
    say(slurm, "squeue", f"{NAME}|77|0|FAILED|h1|NonZeroExitCode\n{NAME}|77|1|TIMEOUT|h1|TimeLimit\n")
    assert cell_states(submitted) == {
        "stock-tp1": "complete", "stock-tp2": "timed-out", "tree-tp1": "missing", "tree-tp2": "missing",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("RUNNING", "running"), ("COMPLETING", "running"), ("CONFIGURING", "running"), ("TIMEOUT", "timed-out"),
        ("PREEMPTED", "preempted"), ("NODE_FAIL", "node-failed"), ("CANCELLED", "cancelled"),
        ("OUT_OF_MEMORY", "failed"), ("COMPLETED", "failed"), ("PENDING", "requeued"),
    ],
)  # fmt: skip
def test_states_of_jobs_in_our_words_where_a_cell_had_started(
    submitted: Sweep, slurm: Path, word: str, ours: str
) -> None:
    attempt(submitted, "stock-tp1")
    say(slurm, "squeue", f"{NAME}|77|0|{word}||None\n")
    assert cell_states(submitted)["stock-tp1"] == ours


def test_a_cell_that_slurm_has_forgotten_failed_if_it_had_started(submitted: Sweep, slurm: Path) -> None:
    attempt(submitted, "tree-tp1")
    (submitted.output / "tree-tp1/log.txt").write_text("step 1\nno such data\n\n")
    rows = {row.cell: row for row in look(submitted)[0]}
    assert (rows["tree-tp1"].state, rows["tree-tp1"].why) == ("failed", "Slurm has forgotten the job, no such data")
    ends = ['{"kind": "lost", "why": "peer"}', '{"kind": "failed", "why": "its own reason"}', '{"kind": "fai']
    (submitted.output / "tree-tp1/ends.jsonl").write_text("\n".join(ends))
    assert look(submitted)[0][2].why == "Slurm has forgotten the job, its own reason"
    assert rows["tree-tp2"].state == "missing"
    assert "77_3, which never started" in rows["tree-tp2"].why


def test_status_prints_one_row_a_cell_with_retries_progress_and_log(
    submitted: Sweep, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(submitted.cells[1], (3.0, 2.0))
    attempt(submitted, "stock-tp2")
    attempt(submitted, "stock-tp2", restart=1)
    (submitted.output / "stock-tp2/log.txt").touch()
    say(slurm, "squeue", f"{NAME}|77|1|RUNNING|b2|None\n{NAME}|77|2|PENDING||Resources\n")
    assert main(["status", str(submitted.output)]) == 0
    out = capsys.readouterr().out
    (running,) = (line for line in out.splitlines() if "stock-tp2" in line)
    assert [word.strip() for word in running.split("│")][1:-1] == [
        "stock-tp2", "77_1", "running", "b2", "2/3", "512", "1", "stock-tp2/log.txt",
    ]  # fmt: skip
    assert "pending: Resources" in out


def test_a_job_that_fails_before_its_run_is_explained_by_its_own_log(submitted: Sweep, slurm: Path) -> None:
    begin(submitted.cells[0])
    (submitted.cells[0].path / "log.txt").write_text("[0] of an earlier job\n")
    (submitted.output.parent / "jobs").mkdir()
    log = submitted.output.parent / "jobs" / "77_0_0_log.out"
    log.write_text("module: command not found\n")
    say(slurm, "squeue", f"{NAME}|77|0|FAILED|h1|NonZeroExitCode\n")
    row = look(submitted)[0][0]
    assert (row.log, row.why) == (log, "failed, module: command not found")


def test_logs_are_shown_relative_to_the_sweep_and_brackets_as_they_are(
    tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = sweep(tmp_path, output="[/x]")
    write_sweep(made)
    submissions.record(made.output, submission(folder=tmp_path / "[/x]" / "jobs"))
    (made.output / "jobs").mkdir()
    (made.output / "jobs/77_0_0_log.out").touch()
    say(slurm, "squeue", f"{NAME}|77|0|RUNNING|gpu[a-b]|None\n")
    assert main(["status", "[/x]"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("[/x]") and "gpu[a-b]" in out and "│ jobs/77_0_0_log.out" in out


def test_status_without_an_answer_from_slurm_shows_the_files_and_says_so(
    submitted: Sweep, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(submitted.cells[0])
    say(slurm, "squeue", "Unable to contact slurm controller", code=1)
    assert cell_states(submitted)["stock-tp1"] == "complete"
    assert cell_states(submitted)["tree-tp1"] == "unknown"
    assert main(["status", str(submitted.output)]) == 0
    assert "nothing is known of the jobs" in capsys.readouterr().out


def test_watch_ends_when_nothing_can_change_and_prints_a_line_per_change(
    submitted: Sweep, slurm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.status.time.sleep", lambda seconds: say(slurm, "squeue", f"{NAME}|77|0|TIMEOUT|h1|x\n"))
    say(slurm, "squeue", f"{NAME}|77|0|RUNNING|h1|None\n")
    assert main(["status", str(submitted.output), "--watch"]) == 0
    changes = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("stock-tp1 ")]
    assert changes == ["running", "timed-out"]


def test_cancel_cancels_exactly_the_elements_of_the_cells_named(
    submitted: Sweep, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"{NAME}|77|{place}|{word}||None\n" for place, word in enumerate("RUNNING COMPLETED PENDING PENDING".split())
    ]
    say(slurm, "squeue", "".join(lines))
    assert main(["cancel", str(submitted.output), "tree-tp1", "stock-tp2"]) == 0
    assert (slurm / "scancel.calls").read_text() == "77_2\n"
    assert capsys.readouterr().out == "cancelled tree-tp1 (job 77_2)\n"
    say(slurm, "squeue", lines[0])
    assert cell_states(submitted)["tree-tp1"] == "cancelled"
    say(slurm, "squeue", "".join(lines))
    assert main(["cancel", str(submitted.output)]) == 0
    assert (slurm / "scancel.calls").read_text() == "77_2\n77_0 77_2 77_3\n"


def test_cancel_finds_a_submission_whose_number_was_never_written_down(tmp_path: Path, slurm: Path) -> None:
    made = sweep(tmp_path)
    write_sweep(made)
    submissions.record(made.output, submission(("tree-tp1",), job=None))
    say(slurm, "squeue", f"{NAME}|91|N/A|PENDING||Priority\n")
    assert main(["cancel", str(made.output)]) == 0
    assert (slurm / "scancel.calls").read_text() == "91\n"


def test_cancel_refuses_a_cell_that_does_not_exist_and_shows_the_error_of_scancel(
    submitted: Sweep, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cancel", str(submitted.output), "tree-tp16"]) == 2
    assert "tree-tp16 is no cell of" in capsys.readouterr().err
    say(slurm, "squeue", f"{NAME}|77|0|RUNNING|h1|None\n")
    say(slurm, "scancel", "scancel: error: Access denied", code=1)
    assert main(["cancel", str(submitted.output)]) == 2
    assert "Access denied" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "cancel", "verdict"])
def test_a_directory_that_is_no_sweeps_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert "has no sweep.json" in capsys.readouterr().err


def test_verdict_on_partial_results_names_what_is_missing(submitted: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    for cell in submitted.cells[:3]:
        finish(cell)
    assert main(["verdict", str(submitted.output)]) == 2
    out = capsys.readouterr().out
    assert "missing: tree-tp2" in out
    assert "no verdict yet: 1 of 4 cells are missing" in out
    finish(submitted.cells[3])
    assert main(["verdict", str(submitted.output)]) == 0
    assert "HELD: tree" in capsys.readouterr().out

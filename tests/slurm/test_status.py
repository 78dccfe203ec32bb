"""`tpcheck status`: what is shown of every cell, with stand-ins for squeue and sacct."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

from slurm import submissions
from slurm.status import look
from tests.support.finished import begin, finish, sweep
from tests.support.slurm_answers import NAME, attempt, cell_states, say, submission
from tpcheck.cli import main
from tpcheck.files import result_dir
from tpcheck.sweep.spec import Sweep
from tpcheck.sweep.stored_spec import write_run, write_sweep


def test_digests_make_a_cell_complete_whatever_slurm_says(submitted: Sweep, slurm: Path) -> None:
    finish(submitted.cells[0])
    say(slurm, "squeue", f"{NAME}|77|0|FAILED|h1|NonZeroExitCode\n{NAME}|77|1|TIMEOUT|h1|TimeLimit\n")
    assert cell_states(submitted) == {
        "stock-tp1": "complete", "stock-tp2": "timed-out", "tree-tp1": "missing", "tree-tp2": "missing",
    }  # fmt: skip


def test_a_complete_cell_that_is_not_what_the_sweep_says_is_told(
    submitted: Sweep, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cell in submitted.cells[:2]:
        finish(cell)
    there = submitted.cells[0].config.model_copy(update={"tp": 4}).model_dump(mode="json")
    result_dir.write_manifest(submitted.cells[1].path, {"config": there})
    assert main(["status", str(submitted.output)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "other settings" in line]
    assert [line.partition(",")[0] for line in told] == [
        "stock-tp2 complete: was made with other settings (tp: 4 there"
    ]


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("RUNNING", "running"), ("COMPLETING", "running"), ("CONFIGURING", "running"), ("TIMEOUT", "timed-out"),
        ("PREEMPTED", "preempted"), ("NODE_FAIL", "node-failed"), ("CANCELLED", "cancelled"),
        ("OUT_OF_MEMORY", "failed"), ("COMPLETED", "failed"), ("PENDING", "requeued"), ("SPECIAL_EXIT", "requeued"),
        ("REQUEUE_HOLD", "requeued"), ("SUSPENDED", "suspended"), ("STOPPED", "suspended"), ("SIGNALING", "running"),
    ],
)  # fmt: skip
def test_states_of_jobs_in_our_words_where_a_cell_had_started(
    submitted: Sweep, slurm: Path, word: str, ours: str
) -> None:
    attempt(submitted, "stock-tp1")
    say(slurm, "squeue", f"{NAME}|77|0|{word}||None\n")
    assert cell_states(submitted)["stock-tp1"] == ours


def test_a_job_that_found_itself_cancelled_when_it_started_has_not_failed(submitted: Sweep, slurm: Path) -> None:
    attempt(submitted, "stock-tp1")
    say(slurm, "squeue", f"{NAME}|77|0|COMPLETED|h1|None\n")
    assert cell_states(submitted)["stock-tp1"] == "failed"
    (submitted.output / "stock-tp1" / "cancelled").touch()
    assert cell_states(submitted)["stock-tp1"] == "cancelled"


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
    assert (row.log, row.why) == (log, "module: command not found")


HEADER = "tpcheck: stock-tp1 on h1, start 1\n"
SRUN = "srun: error: h1: task 0: {}\nsrun: launch/slurm: _step_signal: Terminating StepId=7.0\n"
BEYOND = "tpcheck: not queued again, after 10 times: call tpcheck sweep to go on"


@pytest.mark.parametrize(
    ("log", "why"),
    [
        pytest.param(
            f"{HEADER}0: slurmstepd-h1: error: execve(): /no/python: No such file or directory\n"
            f"{SRUN.format('Exited with exit code 2')}",
            "slurmstepd-h1: error: execve(): /no/python: No such file or directory",
            id="no-such-python",
        ),
        pytest.param(
            f"{HEADER}0: tpcheck: error: /usr/bin/python has no click: use another\n"
            f"1: tpcheck: error: /usr/bin/python has no click: use another\n{SRUN.format('Exited with exit code 2')}",
            "tpcheck: error: /usr/bin/python has no click: use another",
            id="no-click",
        ),
        pytest.param(
            f"{HEADER}0: python: can't open file '/out/code/12': [Errno 2] No such file or directory\n"
            f"{SRUN.format('Exited with exit code 2')}",
            "python: can't open file '/out/code/12': [Errno 2] No such file or directory",
            id="no-code",
        ),
        pytest.param(
            f"{HEADER}0: step 3\n{SRUN.format('Killed')}"
            "1: slurmstepd-h1: error: *** STEP 7.0 ON h1 CANCELLED AT 2026-11-26T07:09:31 ***\n"
            "srun: error: h1: task 1: Terminated\nsrun: Force Terminated StepId=7.0\n",
            "srun: error: h1: task 0: Killed",
            id="killed",
        ),
        pytest.param(f"{HEADER}0: step 3\n{SRUN.format('Killed')}{BEYOND}\n", BEYOND, id="killed-too-often"),
        pytest.param(f"{HEADER}0: old\n{HEADER}module: not found\n", "module: not found", id="the-last-start-counts"),
        pytest.param("tpcheck: not started\n", "tpcheck: not started", id="cancelled"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure_is_the_line_that_says_it(submitted: Sweep, slurm: Path, log: str, why: str) -> None:
    attempt(submitted, "stock-tp1")
    (submitted.output.parent / "jobs").mkdir()
    (submitted.output.parent / "jobs" / "77_0_0_log.out").write_text(log)
    say(slurm, "squeue", f"{NAME}|77|0|FAILED|h1|NonZeroExitCode\n")
    assert look(submitted)[0][0].why == why


def test_a_job_that_has_said_nothing_is_explained_by_what_slurm_knows_and_where_its_output_should_be(
    submitted: Sweep, slurm: Path
) -> None:
    say(slurm, "squeue", f"{NAME}|77|0|FAILED|h1|RaisedSignal:53\n{NAME}|77|1|OUT_OF_MEMORY|h1|None\n")
    first, second, *_ = look(submitted)[0]
    folder = submitted.output.parent / "jobs"
    assert first.why == f"failed (RaisedSignal:53), and it has written nothing to {folder}: can its nodes write there?"
    assert second.why.startswith("out of memory, and it has written nothing")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("SPECIAL_EXIT||JobHeldUser", "pending: special exit, JobHeldUser"),
        ("REQUEUE_HOLD||None", "pending: requeue hold"),
        ("SUSPENDED|h1|None", "suspended"),
        ("PENDING||launch failed requeued held", "pending: launch failed requeued held"),
    ],
)
def test_why_a_job_does_not_go_on_is_shown(
    submitted: Sweep, slurm: Path, said: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    say(slurm, "squeue", f"{NAME}|77|0|{said}\n")
    assert main(["status", str(submitted.output)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "stock-tp1 " in line)
    assert line.split("│")[3].strip() == shown


LONG = "QOSMaxSubmitJobPerUserLimit"


@pytest.mark.parametrize("reason", ["launch failed requeued held", LONG])
@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
def test_on_any_screen_a_cell_takes_a_line_or_two_of_whole_words(
    submitted: Sweep,
    slurm: Path,
    width: int,
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tpcheck.sweep.conclude.console", lambda: Console(width=width))
    finish(submitted.cells[0])
    begin(submitted.cells[1], (3.0, 2.0))
    attempt(submitted, "stock-tp2", restart=1)
    (submitted.output / "stock-tp2/log.txt").touch()
    say(
        slurm,
        "squeue",
        f"{NAME}|18687046|1|RUNNING|gpu[0042-0043]|None\n{NAME}|18687046|2|PENDING||{reason}\n"
        f"{NAME}|18687046|3|PENDING||Resources\n",
    )
    assert main(["status", str(submitted.output)]) == 0
    out = capsys.readouterr().out
    heading, *rows = [line for line in out.splitlines() if line.startswith(("│", "┃"))]
    assert all(len(line) <= width for line in (heading, *rows)) and len(rows) <= 5  # one of them in two lines
    words = set(out.replace("│", " ").split())
    assert words >= {"complete", "running", "stock-tp1", "stock-tp2", "tree-tp1", "tree-tp2", "Resources"}
    assert words >= set(reason.split())
    shown = heading.replace("┃", " ").split()
    assert {"cell", "state"} <= set(shown)
    assert {"job", "step"} <= set(shown) or width < 60
    assert ("log" in shown) == (width >= 120)


def test_a_cell_that_the_sweep_has_no_more_is_shown_as_long_as_its_job_goes_on(
    submitted: Sweep, slurm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(dataclasses.replace(submitted, cells=submitted.cells[:2]))
    write_run(submitted.cells[2], submitted.cells[2].path)
    result_dir.write_manifest(submitted.cells[2].path, {"config": submitted.cells[2].config.model_dump(mode="json")})
    attempt(submitted, "tree-tp1")
    running = f"{NAME}|77|2|RUNNING|h1|None\n"
    say(slurm, "squeue", f"{running}{NAME}|77|3|FAILED|h1|None\n")
    assert main(["status", str(submitted.output)]) == 0
    out = capsys.readouterr().out
    assert "running, not in the sweep" in out and "tree-tp2" not in out
    assert f"tree-tp1 is no longer in the sweep: tpcheck cancel {submitted.output} tree-tp1 ends its job" in out
    assert main(["status", str(submitted.output), "--watch"]) == 0  # and is not waited for
    assert main(["cancel", str(submitted.output), "tree-tp1"]) == 0
    assert (slurm / "scancel.calls").read_text() == "77_2\n"


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
    assert "Unable to contact slurm controller" in capsys.readouterr().out


def test_watch_ends_when_nothing_can_change_and_prints_a_line_per_change(
    submitted: Sweep, slurm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurm.status.time.sleep", lambda seconds: say(slurm, "squeue", f"{NAME}|77|0|TIMEOUT|h1|x\n"))
    say(slurm, "squeue", f"{NAME}|77|0|RUNNING|h1|None\n")
    assert main(["status", str(submitted.output), "--watch"]) == 0
    changes = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("stock-tp1 ")]
    assert changes == ["running", "timed-out"]


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
    assert "1 of 4 cells" in out
    finish(submitted.cells[3])
    assert main(["verdict", str(submitted.output)]) == 0
    assert "HELD: tree" in capsys.readouterr().out

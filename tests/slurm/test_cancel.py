"""`tpcheck cancel`: which jobs scancel is told to end, and which cells are marked."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm import submissions
from tests.support.finished import sweep
from tests.support.slurm_answers import NAME, cell_states, say, submission
from tpcheck.cli import main
from tpcheck.sweep.spec import Sweep
from tpcheck.sweep.stored_spec import write_sweep


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
    assert "not cancelled: stock-tp1 (job 77_0): scancel: scancel: error: Access denied" in capsys.readouterr().err


def test_a_cell_is_marked_while_scancel_is_asked_and_no_longer_when_it_refuses(submitted: Sweep, slurm: Path) -> None:
    say(slurm, "squeue", f"{NAME}|77|0|RUNNING|h1|None\n")
    mark = submitted.output / "stock-tp1" / "cancelled"
    (slurm / "scancel").write_text(f"#!/bin/sh\ntest -e {mark} && touch {slurm}/marked\necho no >&2; exit 1\n")
    assert main(["cancel", str(submitted.output)]) == 2
    assert (slurm / "marked").exists() and not mark.exists()
    (slurm / "scancel").unlink()
    (slurm / "scancel").mkdir()  # cannot be called at all
    assert main(["cancel", str(submitted.output)]) == 2
    assert not mark.exists()
    mark.touch()  # by a call that was not refused: it stays
    assert main(["cancel", str(submitted.output)]) == 2
    assert mark.exists()


def test_of_what_scancel_refuses_in_part_the_rest_is_cancelled(
    submitted: Sweep, slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = f"{NAME}|77|0|RUNNING||None\n{NAME}|77|1|RUNNING||None\n{NAME}|77|2|COMPLETING||None\n"
    after = f"{NAME}|77|0|COMPLETING||None\n{NAME}|77|1|RUNNING||None\n{NAME}|77|2|COMPLETING||None\n"
    say(slurm, "squeue", f"{before}{NAME}|77|3|PENDING||None\n")
    (slurm / "scancel").write_text(f"#!/bin/sh\nprintf '{after}' >{slurm}/squeue.text\necho no >&2; exit 1\n")
    assert main(["cancel", str(submitted.output)]) == 2
    said = capsys.readouterr()
    assert said.out == "cancelled stock-tp1 (job 77_0)\ncancelled tree-tp2 (job 77_3)\n"
    assert "not cancelled: stock-tp2 (job 77_1), tree-tp1 (job 77_2): scancel: no\n" in said.err
    assert {path.parent.name for path in submitted.output.rglob("cancelled")} == {"stock-tp1", "tree-tp2"}

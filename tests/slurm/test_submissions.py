"""What submission leaves in a sweep's directory: submissions, the cells' attempts, the copy of the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slurm import submissions
from slurm.snapshot import Snapshot
from slurm.submissions import Attempt, Submission
from tests.support.finished import sweep
from tpcheck.config.load import parse_run
from tpcheck.errors import TpcheckError
from tpcheck.files.names import ATTEMPTS, SUBMISSIONS, SWEEP
from tpcheck.run.provenance import describe
from tpcheck.sweep.stored_spec import read_sweep, write_sweep


def test_submissions_are_read_but_for_what_a_kill_cut_short(tmp_path: Path) -> None:
    one = Submission("2026-01-01T00:00:00+00:00", "c", "s.1", "7", ("a", "b"), tmp_path)
    submissions.record(tmp_path, one)
    with (tmp_path / SUBMISSIONS).open("a") as file:
        file.write('{"format": 1, "job_na')
    other = Submission("2026-01-02T00:00:00+00:00", "c", "s.2", None, ("b",), tmp_path)
    submissions.record(tmp_path, other)
    assert submissions.read(tmp_path) == [one, other]
    assert submissions.latest(submissions.read(tmp_path)) == {"a": one, "b": other}


def test_submissions_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / SUBMISSIONS).write_text('{"format": 2}\n')
    with pytest.raises(TpcheckError, match="has format 2"):
        submissions.read(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"cells": 5},
        {"cells": [5]},
        {"cells": ["../x"]},
        {"folder": None},
        {"time": "soon"},
        {"time": "2026-01-01T00:00:00"},
        {"job": 7},
        {"job_name": 1},
    ],
    ids=str,
)
def test_submissions_that_somebody_has_changed_are_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    submissions.record(tmp_path, Submission("2026-01-01T00:00:00+00:00", "c", "s.1", "7", ("a", "b"), tmp_path))
    line = json.loads((tmp_path / SUBMISSIONS).read_text())
    (tmp_path / SUBMISSIONS).write_text(json.dumps(line | damage))
    with pytest.raises(TpcheckError, match="a line is not as tpcheck writes it"):
        submissions.read(tmp_path)


@pytest.mark.parametrize("damage", [{"name": "../x"}, {"name": 5}, {"settings": []}, {"group": None}], ids=str)
def test_a_plan_that_somebody_has_changed_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    write_sweep(sweep(tmp_path))
    file = tmp_path / "out" / SWEEP
    plan = json.loads(file.read_text())
    plan["cells"][0] |= damage
    file.write_text(json.dumps(plan))
    with pytest.raises(TpcheckError, match="a cell is not as tpcheck writes it"):
        read_sweep(tmp_path / "out")


def test_attempts_are_read_as_the_script_writes_them(tmp_path: Path) -> None:
    line = '{"job": "7", "array_index": 1, "restart": 2, "nodes": "h[1-2]", "began": "now", "job_name": "s.1"}\n'
    (tmp_path / ATTEMPTS).write_text(line + line[:20])
    assert submissions.attempts(tmp_path) == [Attempt("7", 1, 2, "h[1-2]", "now", "s.1")]


def test_a_copy_of_the_code_says_in_the_manifest_what_it_is(tmp_path: Path, monkeypatch: Any) -> None:
    place = Snapshot.now().write(tmp_path)
    assert Snapshot.now().write(tmp_path) == place and [path.name for path in place.parent.iterdir()] == [place.name]
    monkeypatch.setattr("tpcheck.run.provenance.__file__", str(place / "tpcheck" / "run" / "provenance.py"))

    class Data:
        digest, tokens = "d", 1

    git = describe(parse_run({"model": "qwen3-tiny"}), Data(), [])["git"]
    assert git["digest"].startswith(place.name) and set(git) == {"commit", "dirty", "digest"}

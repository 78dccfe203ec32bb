"""Slurm's commands and a site of stand-ins, for the tests in this folder; those in real/ have a real one."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from slurm import queue, submissions, submit
from tests.support.finished import sweep
from tests.support.slurm_answers import say, submission
from tests.support.slurm_site import Site
from tpcheck.sweep.spec import Sweep
from tpcheck.sweep.stored_spec import write_sweep


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


@pytest.fixture
def submitted(tmp_path: Path) -> Sweep:
    """A sweep of four cells in one array."""
    made = sweep(tmp_path)
    write_sweep(made)
    submissions.record(made.output, submission(folder=tmp_path / "jobs"))
    return made


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "job_states", functools.partial(queue.job_states, patience=0))
    return Site(tmp_path)

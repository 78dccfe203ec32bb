"""`tpcheck sweep --plan`: a sweep for plain sbatch."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from slurm.plan import plan
from slurm.snapshot import Snapshot
from tests.support import ROOT
from tests.support.finished import finish
from tests.support.slurm_site import Site
from tpcheck.cli import main
from tpcheck.config.load import load_run
from tpcheck.errors import TpcheckError


def test_a_plan_refuses_what_was_made_with_other_settings(site: Site) -> None:
    finish(site.cells["stock-tp1"])
    with pytest.raises(TpcheckError, match="seed: 1234 there"):
        plan(site.sweep, ["seed=7"])
    assert not (site.out / "sweep.json").exists()


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


def test_a_plan_has_arrays_as_small_as_slurm_wants_them(site: Site) -> None:
    (site.folder / "config").write_text("MaxArraySize            = 3\n")
    lines = [shlex.split(line) for line in plan(site.sweep)]
    assert [[word for word in line if word.startswith(("FIRST", "--array"))] for line in lines] == [
        ["--array=0,2"], ["--array=1"], ["FIRST=3", "--array=0"],
    ]  # fmt: skip


def test_a_plan_made_in_the_clone_needs_no_copy_of_the_code(site: Site, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    assert {shlex.split(line)[1] for line in plan(site.sweep)} == {"sbatch"}
    assert not (site.out / "code").exists()


def test_the_command_prints_the_lines_and_submits_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(site.sweep), "--plan"]) == 0
    assert capsys.readouterr().out.splitlines() == plan(site.sweep)
    assert main(["sweep", str(site.sweep), "--plan", "--cluster", "x"]) == 2

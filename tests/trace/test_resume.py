"""A traced resume against the uninterrupted run: identical at the same layout, and what was not restored is named."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from patches import cpu
from tests.silent_bugs import BUGS
from tests.support.traces import BASE, Runs
from tpcheck.config.load import parse_run
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.run.launch import launch
from tpcheck.run.nudged import make_nudged_runs
from tpcheck.trace.compare.command import compare, to_json
from tpcheck.trace.compare.comparison import Comparison
from tpcheck.trace.compare.reader import Trace

cpu.enable()
FOUR = {"steps": 4, "trace": {"steps": [0, 1, 2, 3]}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resumed"))


def resumed(path: Path, bug: contextlib.AbstractContextManager[None], **layout: Any) -> Path:
    """A run that is stopped after two steps, and resumed with a `bug`."""
    settings = {**BASE, **FOUR, **layout, "output": str(path)}
    assert launch(parse_run({**settings, "trace": None, "stop_after": 2})) == 0
    with bug:
        assert launch(parse_run(settings), resume=True) == 0
    return path


def judged(runs: Runs, path: Path, bug: contextlib.AbstractContextManager[None]) -> Comparison:
    return compare(runs.reference(**FOUR), resumed(path, bug))


def test_a_clean_resume_is_identical(runs: Runs, tmp_path: Path) -> None:
    found = judged(runs, tmp_path / "b", contextlib.nullcontext())
    assert found.verdict == "identical" and not found.unmapped
    assert found.notes == ["A has steps [0, 1, 2, 3], B has [2, 3]: compared where both have them"]
    assert to_json(found)["notes"] == found.notes
    begun = {row.key.kind for row in found.rows if row.key.kind.startswith("resumed")}
    assert begun == {"resumed.weight", "resumed.main", "resumed.exp_avg", "resumed.exp_avg_sq"}


@pytest.mark.parametrize(
    ("name", "first", "words"),
    [
        ("moments not restored", "resumed.exp_avg ", "begins at zero"),
        ("main parameters rebuilt from rounded weights", "resumed.main ", "rebuilt from the rounded weights"),
        ("one weight not loaded", "resumed.main decoder.final_layernorm.weight", "rounded to bfloat16"),
    ],
)
def test_what_was_not_restored_is_named(runs: Runs, tmp_path: Path, name: str, first: str, words: str) -> None:
    found = judged(runs, tmp_path / "b", BUGS[name].inject())
    assert found.first is not None and found.first.key.step == 2
    assert f"{found.first.key.kind} {found.first.key.name}".startswith(first)
    assert words in found.first.why


def test_a_resume_beyond_the_steps_to_trace_is_refused(tmp_path: Path) -> None:
    settings = {**BASE, "steps": 4, "output": str(tmp_path / "run")}
    assert launch(parse_run({**settings, "stop_after": 2})) == 0
    manifest = (tmp_path / "run/manifest.json").read_bytes()
    with pytest.raises(TpcheckError, match=r"trace.steps=\[0, 1\] are done, this run goes on from step 2"):
        launch(parse_run({**settings, "trace": {"steps": [0, 1]}}), resume=True)
    assert (tmp_path / "run/manifest.json").read_bytes() == manifest


def test_a_run_that_has_made_its_trace_goes_on_without(tmp_path: Path) -> None:
    settings = {**BASE, "steps": 4, "output": str(tmp_path / "run"), "trace": {"steps": [0, 1]}}
    assert launch(parse_run({**settings, "stop_after": 3})) == 0
    assert launch(parse_run({**settings, "tp": 2}), resume=True) == 0
    assert Trace(tmp_path / "run/trace").steps == [0, 1]
    assert result_dir.final_digests(tmp_path / "run", 4)
    make_nudged_runs(tmp_path / "run", seeds=1)
    assert Trace(tmp_path / "run/noise-1/trace").tp == 1  # as the run was when it was traced


def test_a_trace_that_an_earlier_start_has_begun_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = {**BASE, "steps": 4, "output": str(output), "trace": {"steps": [0, 1, 2, 3]}}
    assert launch(parse_run({**settings, "stop_after": 3, "trace": {"steps": [0, 1]}})) == 0
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    with pytest.raises(TpcheckError, match="trace holds a trace already: move it away"):
        launch(parse_run(settings), resume=True)
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before


def test_a_run_that_was_killed_while_it_was_traced_goes_on_and_traces_what_is_to_come(tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = {**BASE, "steps": 4, "output": str(output), "trace": {"steps": [0, 1, 2, 3]}}
    assert launch(parse_run({**settings, "tp": 2, "stop_after": 2})) == 0
    end = output / "trace/rank-00001/rank.json"
    begun = json.loads(end.read_text())
    del begun["records"]  # as it is until the last step is recorded
    end.write_text(json.dumps(begun))
    assert launch(parse_run(settings), resume=True) == 0
    found = Trace(output / "trace")
    assert (found.steps, found.tp) == ([2, 3], 1)

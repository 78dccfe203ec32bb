"""The trace of a script with Megatron-LM's training loop, which is imported when the script runs."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.training_script import checkout
from tpcheck.errors import TpcheckError
from tpcheck.trace.compare.command import compare
from tpcheck.trace.compare.estimate import open_trace
from tpcheck.trace.compare.logical import Key
from tpcheck.trace.record.script import trace_script


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = checkout(tmp_path / "checkout")
    monkeypatch.syspath_prepend(str(path.parent))
    yield path
    for name in [name for name in sys.modules if name.startswith("megatron.training")]:
        del sys.modules[name]


def run(script: Path, *args: object) -> None:
    sys.argv[1:] = map(str, args)
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture(autouse=True)
def arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])


def test_steps_are_counted_from_the_first_and_the_trace_is_whole_before_training_ends(
    script: Path, tmp_path: Path
) -> None:
    with trace_script(tmp_path / "a", steps=[0, 2]):
        run(script, 5)
    trace = open_trace(tmp_path / "a")
    assert trace.steps == [0, 2]
    assert {key.kind for key in trace.order} >= {"start", "out", "dout", "grad", "weight", "state.exp_avg"}
    assert {Key(0, "start", "0.weight"), Key(2, "weight", "2.bias")} <= trace.order.keys()
    from megatron.training import training  # type: ignore[import-not-found]

    assert training.train_step.__module__ == training.__name__ and not hasattr(training.train_step, "__wrapped__")


def test_nudged_traces_lie_where_compare_looks_for_them(script: Path, tmp_path: Path) -> None:
    for path, perturb in (("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0)):
        with trace_script(tmp_path / path, perturb=perturb):
            run(script, 2)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.verdict == "identical"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["noise-1", "noise-2", "noise-3", "rank-00000"]


@pytest.mark.parametrize("code", [0, 3])
def test_a_script_that_exits_leaves_a_whole_trace_only_if_nothing_is_wrong(
    script: Path, tmp_path: Path, code: int
) -> None:
    with pytest.raises(SystemExit), trace_script(tmp_path / "a", steps=[0, 9]):
        run(script, 2, code)
    if code:
        with pytest.raises(TpcheckError, match="was cut short"):
            open_trace(tmp_path / "a")
    else:
        assert open_trace(tmp_path / "a").steps == [0]


def test_what_cannot_be_traced_is_said_in_a_line(script: Path, tmp_path: Path) -> None:
    with trace_script(tmp_path / "a"):
        run(script, 2)
    with pytest.raises(TpcheckError, match="a trace already"), trace_script(tmp_path / "a"):
        raise AssertionError
    with pytest.raises(TpcheckError, match="made 2 steps, none of steps=\\[7\\]"), trace_script(tmp_path / "b", [7]):
        run(script, 2)
    with pytest.raises(TpcheckError, match="never called megatron.training.training.train_step"):  # noqa: SIM117
        with trace_script(tmp_path / "c"):
            run(script, 0)
    with pytest.raises(TpcheckError, match="steps=.*-1"), trace_script(tmp_path / "d", [-1]):
        raise AssertionError

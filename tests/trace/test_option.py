"""`python -m patches --trace`: a script is traced, and what makes no sense is refused in a line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from patches.__main__ import main
from tests.support.training_script import checkout
from tpcheck.trace.compare.command import compare
from tpcheck.trace.compare.estimate import open_trace


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return checkout(tmp_path / "checkout")


def patched(folder: Path, script: Path, *options: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "patches", "--strategy", "stock", *options, str(script), "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_script_is_traced_and_a_nudged_run_of_it_lies_beside(script: Path, tmp_path: Path) -> None:
    patched(tmp_path, script, "--trace", "out/a", "--steps", "1")
    patched(tmp_path, script, "--trace", "out/a", "--steps", "1", "--perturb", "1")
    assert open_trace(tmp_path / "out/a").steps == [1]
    assert open_trace(tmp_path / "out/a/noise-1").perturb == 1
    assert compare(tmp_path / "out/a", tmp_path / "out/a").verdict == "identical"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trace", "old"], "old holds a trace already: name another folder, or remove it"),
        (["--trace", "out", "--steps", "first"], "--steps first: name them by numbers from 0, as in --steps 0,1"),
        (["--trace", "out", "--steps", "-1"], "steps=[-1]"),
        (["--steps", "0"], "--steps and --perturb say how to trace: add --trace OUT"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    script: Path, tmp_path: Path, options: list[str], words: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "old/rank-00000").mkdir(parents=True)
    (tmp_path / "old/rank-00000/rank.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["patches", "--strategy", "stock", *options, str(script), "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m patches: ") and words in line
    assert not (tmp_path / "out").exists()

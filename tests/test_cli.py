"""The command line: one line and exit code 2 for bad input, nothing heavy imported before it is needed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tpcheck
from tests.support import ROOT
from tests.support.torch_dist import save
from tpcheck import cli
from tpcheck.checkpoint import digest
from tpcheck.cli import main
from tpcheck.errors import TpcheckError


def test_help_and_version_are_answered(capsys: Any) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("train", "hash", "diff", "order", "cost", "sweep"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tpcheck {tpcheck.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["nonsense"], "No such command"),
        (["hash"], "Missing argument"),
        (["hash", "--nonsense", "x"], "No such option"),
        (["hash", "no/such/folder"], "no/such/folder: "),
        (["diff", "a"], "Missing argument"),
        (["diff", "no/such/a", "no/such/b"], "no/such/a: "),
        (["train", "no/such/run.yaml"], "no/such/run.yaml"),
        (["sweep", "no/such/sweep.yaml"], "no/such/sweep.yaml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("tpcheck: error: ")
    assert output.err.count("\n") == 1
    assert message in output.err


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (TpcheckError("two\n lines"), 2, "tpcheck: error: two lines\n"),
        (PermissionError(13, "Permission denied", "file"), 2, "tpcheck: error: file: Permission denied\n"),
        (OSError(28, "No space left on device"), 2, "tpcheck: error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_have_their_exit_codes(
    raised: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(digest, "command", lambda *args, **kwargs: _raise(raised))
    assert main(["hash", "x"]) == status
    assert capsys.readouterr().err.lstrip("\n") == line


def test_a_bug_shows_its_traceback_and_is_not_taken_for_a_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(digest, "command", lambda *args, **kwargs: _raise(ZeroDivisionError("oops")))
    assert main(["hash", "x"]) == cli.BUG
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_reason_to_complain(tmp_path: Path) -> None:
    many = {f"layer{index}.{'x' * 200}": torch.ones(1) for index in range(500)}
    path = save(tmp_path / "x", many)
    command = [sys.executable, "-m", "tpcheck", "hash", "--tensors", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == cli.PIPE_CLOSED


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys, tpcheck.cli; sys.exit(sum(name in sys.modules for name in ('torch', 'numpy', 'rich', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("command", [["cost", "qwen3-tiny"], ["verdict", "."], ["status", "nowhere"], ["--help"]])
@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_no_command_with_a_traceback(command: list[str], redirection: str) -> None:
    line = f"{shlex.join([sys.executable, '-m', 'tpcheck', *command])} {redirection}"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr


def test_a_terminal_that_lacks_our_letters_is_written_to() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "tpcheck", "cost", "qwen3-8b"]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("package", ["click", "blake3"])
def test_a_python_without_one_of_the_packages_says_so_in_one_line(package: str, tmp_path: Path) -> None:
    hide = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv[0] = 'tpcheck'"
    call = [sys.executable, "-c", f"{hide}; runpy.run_module('tpcheck', run_name='__main__')", "hash", str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    message = f"tpcheck: error: {sys.executable} has no {package}: use a Python that tpcheck is installed for\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)

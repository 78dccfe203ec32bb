"""A run that is killed at any of its file operations is read by every command, and goes on to the same bits."""

from __future__ import annotations

import builtins
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tpcheck.run.train  # noqa: F401  once, not in every child
from tests.fuzz.child import complaint, in_child
from tpcheck.cli import main
from tpcheck.config.load import parse_run
from tpcheck.files import result_dir
from tpcheck.run.launch import launch

RUN: dict[str, Any] = {
    "model": {"preset": "qwen3-tiny", "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
              "num_query_groups": 2, "head_dim": 8, "ffn_hidden_size": 24, "vocab_size": 32, "max_positions": 64},
    "data": {"kind": "synthetic"}, "seq_length": 8, "micro_batch_size": 2, "global_batch_size": 2, "steps": 3,
    "checkpoint_every": 1, "output": "run",
}  # fmt: skip
POINTS = 12  # that are tried unless all are
COMMANDS = (["hash", "run"], ["diff", "run", "whole"], ["verdict", "."], ["status", "."])


class Dying:
    """Ends this process and its launcher by SIGKILL at the `at`-th operation on files; counts them in `count`."""

    def __init__(self, at: int, count: Path) -> None:
        self.at, self.count, self.launcher = at, count, os.getpid()

    def install(self) -> None:
        for name in ("replace", "rename", "fsync", "mkdir", "unlink", "truncate", "ftruncate"):
            setattr(os, name, self._dying(getattr(os, name)))
        opened = builtins.open

        def opening(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if any(letter in mode for letter in "wax+"):
                self._operation()
            return opened(file, mode, *args, **kwargs)

        builtins.open = opening  # type: ignore[assignment]

    def _dying(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._operation()
            return function(*args, **kwargs)

        return call

    def _operation(self) -> None:
        handle = os.open(self.count, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, b".")
        os.close(handle)
        if self.count.stat().st_size == self.at:
            if self.launcher != os.getpid():
                os.kill(self.launcher, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, at: int = 0) -> int:
    """Train in `folder`, to be killed at operation `at`; how many there were."""
    count = folder.with_suffix(".count")
    count.unlink(missing_ok=True)

    def run() -> int:
        Dying(at, count).install()
        return launch(parse_run(RUN))

    in_child(run, folder)
    return count.stat().st_size


def digests(run: Path) -> Any:
    found = result_dir.read_digests(run)
    return found and (found["step"], found["model"], found["optimizer"])


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_killed_at_a_file_operation_is_read_and_goes_on_to_the_same_bits(every: bool, tmp_path: Path) -> None:
    whole = tmp_path / "reference"
    whole.mkdir()
    operations = train(whole)
    assert operations > 30
    points = range(1, operations + 1) if every else sorted(random.Random(0).sample(range(1, operations), POINTS))
    for at in points:
        folder = tmp_path / str(at)
        folder.mkdir()
        shutil.copytree(whole / "run", folder / "whole")
        (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
        train(folder, at)
        for words in COMMANDS:
            code, _, errors = in_child(lambda words=words: main(words), folder)  # type: ignore[misc]
            assert not complaint(code, errors), f"operation {at}: {words}: {errors}"
        code, _, errors = in_child(lambda: main(["train", "run.yaml", "--resume"]), folder)
        assert code == 0, f"operation {at}: {errors}"
        assert digests(folder / "run") == digests(whole / "run"), f"operation {at}"
        assert [row["loss_hex"] for row in result_dir.read_steps(folder / "run")] == [
            row["loss_hex"] for row in result_dir.read_steps(whole / "run")
        ]
        shutil.rmtree(folder)

"""Result directories: what is written is read back, and a kill at any moment leaves the old state or the new."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcheck.errors import TpcheckError
from tpcheck.files import json_files, result_dir
from tpcheck.files.names import STEPS


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test may catch it or clean up after it."""


class HalfWrites(io.FileIO):
    """A file whose writes are interrupted half-way when the turn has come."""

    def __init__(self, file: Any, mode: str, tick: Callable[[], None]) -> None:
        super().__init__(file, mode.replace("b", ""))
        self._tick = tick

    def write(self, data: Any) -> int:
        try:
            self._tick()
        except Killed:
            super().write(data[: len(data) // 2])
            raise
        return super().write(data)


@contextlib.contextmanager
def killed_at(turn: int) -> Iterator[None]:
    """Every file operation counts; the one with number `turn` does not happen, and no later one does."""
    count = itertools.count()

    def tick() -> None:
        if next(count) >= turn:
            raise Killed

    def guarded(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            tick()
            return operation(*args, **kwargs)

        return run

    def opened(file: Any, mode: str = "r") -> Any:
        tick()
        return HalfWrites(file, mode, tick) if "r" not in mode else open(file, mode)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", "open", "unlink"):
            patch.setattr(os, name, guarded(getattr(os, name)))
        patch.setattr(json_files, "open", opened, raising=False)
        yield


def kills(write: Callable[[], None]) -> Iterator[int]:
    """Run `write`, killed at its first, second, … operation, until it survives."""
    for turn in itertools.count():
        try:
            with killed_at(turn):
                write()
        except Killed:
            yield turn
        else:
            yield turn
            return


def steps(*numbers: int) -> list[dict[str, Any]]:
    return [{"step": number, "loss": 1 / number, "loss_hex": (1 / number).hex()} for number in numbers]


def filled(path: Path, *numbers: int) -> Path:
    path.mkdir(exist_ok=True)
    for record in steps(*numbers):
        result_dir.append_step(path, record)
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    result_dir.write_manifest(tmp_path, {"config": {"tp": 2}})
    assert result_dir.read_manifest(tmp_path) == {"format": 1, "config": {"tp": 2}}
    assert result_dir.read_digests(tmp_path) is None
    parts = {"model": {}, "optimizer": {}}
    digests = {"step": 3, "algorithm": "blake3", "model": "ab", "optimizer": None, "tensors": parts}
    result_dir.write_digests(tmp_path, digests)
    assert result_dir.read_digests(tmp_path) == {"format": 1, **digests}
    assert result_dir.read_steps(filled(tmp_path, 1, 2, 3)) == steps(1, 2, 3)


def test_not_a_number_is_read_back(tmp_path: Path) -> None:
    result_dir.append_step(tmp_path, {"step": 1, "loss": float("nan"), "loss_hex": float("nan").hex()})
    assert result_dir.read_steps(tmp_path)[0]["loss_hex"] == "nan"


def test_a_kill_while_a_file_is_replaced_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    result_dir.write_manifest(tmp_path, {"config": {"new": False}})
    seen = []
    for _ in kills(lambda: result_dir.write_manifest(tmp_path, {"config": {"new": True}})):
        seen.append(result_dir.read_manifest(tmp_path)["config"]["new"])
    assert seen == sorted(seen)
    assert {*seen} == {False, True}


def test_a_kill_while_a_step_is_appended_leaves_it_out_or_in_and_the_next_append_is_whole(tmp_path: Path) -> None:
    for turn in range(20):
        path = filled(tmp_path / str(turn), 1, 2)
        try:
            with killed_at(turn):
                result_dir.append_step(path, steps(3)[0])
        except Killed:
            assert result_dir.read_steps(path) in (steps(1, 2), steps(1, 2, 3))
            result_dir.append_step(path, steps(len(result_dir.read_steps(path)) + 1)[0])
            assert result_dir.read_steps(path) in (steps(1, 2, 3), steps(1, 2, 3, 4))
        else:
            assert result_dir.read_steps(path) == steps(1, 2, 3)
            assert turn > 2
            return


def test_a_kill_while_steps_are_truncated_leaves_all_or_what_was_asked_for(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2, 3, 4)
    for _ in kills(lambda: result_dir.truncate_steps(tmp_path, 2)):
        assert result_dir.read_steps(tmp_path) in (steps(1, 2, 3, 4), steps(1, 2))
    assert result_dir.read_steps(tmp_path) == steps(1, 2)


def test_a_real_kill_leaves_consecutive_steps(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        for number in itertools.count(1):
            result_dir.append_step(tmp_path, steps(number)[0])
    while not (tmp_path / STEPS).exists():
        time.sleep(0.001)
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    found = result_dir.read_steps(tmp_path)
    assert found == steps(*range(1, len(found) + 1))


@settings(deadline=None)
@given(st.integers(0, 200))
def test_a_torn_last_line_is_not_there(cut: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = filled(Path(folder), 1, 2, 3)
        text = (path / STEPS).read_bytes()
        (path / STEPS).write_bytes(text[:cut])
        kept = text[:cut].count(b"\n")
        assert result_dir.read_steps(path) == steps(1, 2, 3)[:kept]
        result_dir.append_step(path, steps(kept + 1)[0])
        assert result_dir.read_steps(path) == steps(*range(1, kept + 2))


def test_truncating_a_run_that_never_stepped_leaves_no_steps(tmp_path: Path) -> None:
    result_dir.truncate_steps(tmp_path, 0)
    assert result_dir.read_steps(tmp_path) == []


def test_checkpoints_are_listed_by_step_and_only_when_in_place(tmp_path: Path) -> None:
    for name in ("step-00000020", "step-00000003", ".new-step-00000030", "step-7"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000040").touch()
    assert [step for step, _ in result_dir.checkpoints(tmp_path)] == [3, 20]
    assert result_dir.checkpoints(tmp_path)[1][1] == result_dir.checkpoint_path(tmp_path, 20)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, "", "no manifest.json"),
        ("manifest.json", "{", "not JSON"),
        ("manifest.json", "[]", "holds a list"),
        ("manifest.json", "[" * 100_000, "not JSON"),
        ("manifest.json", b"\xff\xfe", "not JSON"),
        ("manifest.json", '{"config": {}}', "format None, this tpcheck reads format 1"),
        ("manifest.json", '{"format": 2, "config": {}}', "format 2, this tpcheck reads format 1"),
        ("manifest.json", '{"format": 1}', "'config': Field required"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(
    name: str | None, text: str | bytes, message: str, tmp_path: Path
) -> None:
    if name:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(TpcheckError, match=message) as error:
        result_dir.read_manifest(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{", json.dumps(steps(1)[0])], "steps.jsonl:1 is not JSON"),
        ([json.dumps(record) for record in steps(1, 3)], "step 3 stands where 2 should"),
        ([json.dumps(record) for record in steps(1, 1)], "step 1 stands where 2 should"),
        (['{"loss": 1}'], "'step': Field required"),
    ],
)
def test_steps_that_are_not_in_order_are_refused(lines: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / STEPS).write_text("".join(line + "\n" for line in lines))
    with pytest.raises(TpcheckError, match=message):
        result_dir.read_steps(tmp_path)

"""A run whose checkpoint is damaged, or would run something, does not go on from it."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from tests.support import BEFORE
from tests.support.pickles import Shell
from tpcheck.checkpoint.reader import Checkpoint
from tpcheck.checkpoint.unpickle import load_archive
from tpcheck.cli import main

OVERRIDES = ["tp=1", "stop_after=null", "trace=null"]


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that was stopped after step 2."""
    shutil.unpack_archive(BEFORE / "states.tar.xz", tmp_path)
    shutil.copytree(BEFORE / "stopped", tmp_path / "stopped", dirs_exist_ok=True)
    return tmp_path / "stopped"


def resume(run: Path) -> int:
    return main(["train", str(BEFORE / "run.yaml"), "--resume", f"output={run}", *OVERRIDES])


def test_what_a_checkpoint_would_run_is_not_run(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = stopped / "checkpoints/step-00000002/.metadata"
    metadata = pickle.loads(index.read_bytes())
    metadata.planner_data = Shell(stopped / "marker")
    index.write_bytes(pickle.dumps(metadata))
    assert resume(stopped) == 2
    assert not (stopped / "marker").exists()
    assert "would run 'posix.system' when it is loaded" in capsys.readouterr().err


def test_a_flipped_bit_is_seen_before_anything_is_trained(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint(stopped / "checkpoints/step-00000002")
    item = checkpoint.tensors["output_layer.weight"].chunks[0].item
    stored = load_archive(checkpoint._view(item), "x")
    shard = checkpoint.path / item.file
    content = bytearray(shard.read_bytes())
    content[item.position + stored.position + 100] ^= 1
    shard.write_bytes(content)
    before = (stopped / "steps.jsonl").read_bytes()
    assert resume(stopped) == 2
    assert str(shard.name) in capsys.readouterr().err
    assert (stopped / "steps.jsonl").read_bytes() == before


def test_a_checkpoint_that_was_not_copied_whole_is_refused_with_a_way_out(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = stopped / "checkpoints/step-00000002"
    next(checkpoint.glob("*.distcp")).unlink()
    assert resume(stopped) == 2
    assert f"(without {checkpoint}, the run goes on from what was saved before)" in capsys.readouterr().err


def test_a_record_of_steps_that_ends_before_the_checkpoint_is_refused(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *_ = (stopped / "steps.jsonl").read_text().splitlines()
    (stopped / "steps.jsonl").write_text(first + "\n")
    assert resume(stopped) == 2
    assert "steps.jsonl ends at step 1, " in capsys.readouterr().err
    assert (stopped / "steps.jsonl").read_text() == first + "\n"

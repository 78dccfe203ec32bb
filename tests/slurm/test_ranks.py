"""Ranks that Slurm has started: where they meet, and what they say of their end to whoever may start them again."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tpcheck.cli import main
from tpcheck.config.load import load_run
from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError
from tpcheck.files.names import EXIT_REASONS
from tpcheck.run import exit_reason, launch
from tpcheck.run.place import Place, place_from_environment


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TpcheckError("no such preset"), "failed"),
        (ValueError("x"), "failed"),
        (RuntimeError("[…/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:2"), "lost"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "lost"),
        (RuntimeError("CUDA out of memory"), "failed"),
        (type("DistNetworkError", (type("DistError", (RuntimeError,), {}),), {})("timed out"), "lost"),
    ],
)
def test_a_rank_says_whether_it_would_fail_again(tmp_path: Path, monkeypatch: Any, error: Exception, kind: str) -> None:
    monkeypatch.setenv("TPCHECK_ENDS", str(tmp_path / EXIT_REASONS))
    exit_reason.record_error(error, 3)
    line = json.loads((tmp_path / EXIT_REASONS).read_text())
    assert (line["kind"], line["rank"]) == (kind, 3) and str(error)[:10] in line["why"]


def test_a_rank_that_loses_another_while_it_loads_a_checkpoint_has_not_failed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TPCHECK_ENDS", str(tmp_path / EXIT_REASONS))
    try:
        raise TpcheckError("damaged") from RuntimeError("[gloo/pair.cc:537] Connection closed")
    except TpcheckError as error:
        exit_reason.record_error(error, 3)
    assert json.loads((tmp_path / EXIT_REASONS).read_text())["kind"] == "lost"


def test_a_refused_run_leaves_its_reason_for_the_batch_script(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TPCHECK_ENDS", str(tmp_path / EXIT_REASONS))
    assert main(["train", str(_run_file(tmp_path)), "tp=3"]) == 2
    assert json.loads((tmp_path / EXIT_REASONS).read_text())["kind"] == "failed"


def test_a_start_waits_for_one_that_a_lost_node_still_runs(tmp_path: Path, monkeypatch: Any) -> None:
    config = load_run(_run_file(tmp_path), [f"output={tmp_path}/out"])
    with launch._exclusively(config):
        with pytest.raises(TpcheckError, match="another run"), launch._exclusively(config):
            pass  # nobody has started this one who could want it to wait
        monkeypatch.setenv("TPCHECK_ENDS", str(tmp_path / EXIT_REASONS))
        began = threading.Event()
        waiting = threading.Thread(target=_write, args=(config, began))
        waiting.start()
        assert not began.wait(0.2)
    waiting.join(10)
    assert began.is_set()


def _write(config: RunConfig, began: threading.Event) -> None:
    with launch._exclusively(config):
        began.set()


SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "h[1-2]", "SLURM_JOB_ID": "7"}
RANK1 = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


def test_ranks_of_srun_meet_where_the_batch_script_says(tmp_path: Path, monkeypatch: Any) -> None:
    for name, value in {**SRUN, **RANK1, "MASTER_ADDR": "h1", "MASTER_PORT": "20007", "PATH": "/nowhere"}.items():
        monkeypatch.setenv(name, value)
    found = place_from_environment(load_run(_run_file(tmp_path)))
    assert found == Place(rank=1, world_size=2, local_rank=0, meeting="tcp://h1:20007")


def test_ranks_of_srun_that_cannot_tell_where_to_meet_say_so(tmp_path: Path, monkeypatch: Any) -> None:
    for name, value in {**SRUN, **RANK1, "PATH": "/nowhere"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(TpcheckError, match=r"cannot tell which of the nodes h\[1-2\] is the first .*: set MASTER_ADDR"):
        place_from_environment(load_run(_run_file(tmp_path)))


def _run_file(folder: Path) -> Path:
    (folder / "run.yaml").write_text("model: qwen3-tiny\ntp: 2\n")
    return folder / "run.yaml"

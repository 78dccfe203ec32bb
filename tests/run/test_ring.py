"""Ranks that srun or torchrun has started find out about each other's silence."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from torch.distributed import FileStore, HashStore  # type: ignore[attr-defined]

from tests.support.waiting import wait_for
from tpcheck.run import heartbeat
from tpcheck.run.heartbeat import HURRIED, SILENCE, Watch
from tpcheck.run.place import Place
from tpcheck.run.ring import Ring


def test_each_rank_looks_after_the_next_from_the_first_beat_on() -> None:
    store = HashStore()
    first, second = Ring(store, 0, 2), Ring(store, 1, 2)
    first.exchange()
    assert first.lost(1e6, is_stopping=False) is None  # it may not have come so far
    for _ in range(5):
        second.exchange()
        first.exchange()
        assert first.lost(SILENCE - 1, is_stopping=False) is None
    assert first.lost(HURRIED, is_stopping=True) == first.lost(1.0, is_stopping=False) == 1
    second.exchange()
    first.exchange()
    assert first.lost(0.0, is_stopping=True) is None


def test_where_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "h1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    meetings = ["env://", "tcp://fe80::1:20007", "file:///scratch/store"]
    assert [Place(0, 2, 0, name).address for name in meetings] == [("h1", 29500), ("fe80::1", 20007), None]


def test_a_rank_that_waits_for_a_stopped_one_to_save_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HURRIED", 2.0)
    waiting, stopped = (_rank(number, tmp_path) for number in (0, 1))
    try:
        wait_for(lambda: all((tmp_path / f"{number}").exists() for number in (0, 1)), 200)
        os.kill(stopped, signal.SIGSTOP)
        os.kill(waiting, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(waiting, 0)[1]) == 1
        assert '"lost"' in (tmp_path / "ends").read_text() and "rank 1 gives no sign" in (tmp_path / "ends").read_text()
    finally:
        os.kill(stopped, signal.SIGKILL)
        os.waitpid(stopped, 0)


def _rank(number: int, folder: Path) -> int:
    """A forked rank that waits in a save for two minutes at most; it is there once it has heard the other."""
    if pid := os.fork():
        return pid
    try:
        os.environ["TPCHECK_ENDS"] = str(folder / "ends")
        signal.signal(signal.SIGTERM, lambda *_: None)
        watch, ring = Watch(number), Ring(FileStore(str(folder / "store"), 2), number, 2)
        with watch.unhurried():
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                ring.exchange()
                if ring.heard:
                    watch.peers = ring
                    (folder / f"{number}").touch()
                time.sleep(0.1)
    finally:
        os._exit(70)

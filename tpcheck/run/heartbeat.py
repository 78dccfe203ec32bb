"""Signs of life of a run's ranks, and what a request to stop becomes when a rank cannot answer it.

    rank       a thread counts up in memory shared with the launcher, once a second; when SIGTERM has come and the
               step has not ended after PATIENCE seconds, for a peer or a device hangs, it ends the rank
    launcher   a rank that no longer counts is stopped or has lost its machine: all are ended
    ring       where others started the ranks, each hears so of the next (ring.py), and ends itself

The thread hears signals by a pipe that C writes to: Python's own handlers wait for the main thread, which may wait
for a collective.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from tpcheck.run import exit_reason

__all__ = ["BEAT", "ENDED", "PATIENCE", "Peers", "Pulse", "Watch", "is_lost", "no_sign_of"]

PATIENCE = 25.0  # seconds from SIGTERM to the end of a step
BEAT = 1.0
SILENCE, HURRIED = 120.0, 20.0  # seconds without a beat until a rank is lost; once a stop was asked for
ENDED = 128 + signal.SIGTERM  # exit code of a rank that was ended so, as a shell says it


def is_lost(silence: float, is_stopping: bool) -> bool:
    return silence > (HURRIED if is_stopping else SILENCE)


def no_sign_of(rank: int) -> str:
    return f"rank {rank} gives no sign of life: it is stopped, or its machine hangs"


class Peers(Protocol):
    """Whoever knows of other ranks that no launcher sees."""

    def lost(self, seconds: float, is_stopping: bool) -> int | None: ...


class Pulse:
    """How often each rank has beaten, in memory that forked ranks share; the launcher asks who has fallen silent."""

    def __init__(self, ranks: int) -> None:
        self.memory = mmap.mmap(-1, 8 * ranks)
        self.seen = dict.fromkeys(range(ranks), -1)
        self.silent = dict.fromkeys(range(ranks), 0.0)

    def beat(self, rank: int) -> None:
        struct.pack_into("Q", self.memory, 8 * rank, self._count(rank) + 1)

    def lost(self, seconds: float, is_stopping: bool) -> list[int]:
        """The ranks that have been silent for too long, of which `seconds` have gone by since the last call.

        Told so, and not by a clock, since the launcher may have been stopped itself.
        """
        for rank in self.seen:
            count = self._count(rank)
            self.silent[rank] = self.silent[rank] + seconds if count == self.seen[rank] else 0.0
            self.seen[rank] = count
        return [rank for rank, silence in self.silent.items() if is_lost(silence, is_stopping)]

    def _count(self, rank: int) -> int:
        return int(struct.unpack_from("Q", self.memory, 8 * rank)[0])


class Watch:
    """A rank's thread: beats, and ends the rank when SIGTERM goes unanswered. To be made in the main thread."""

    def __init__(self, rank: int, pulse: Pulse | None = None) -> None:
        self.rank, self.pulse = rank, pulse
        self.asked: float | None = None  # when SIGTERM came
        self.in_step = True
        self.peers: Peers | None = None
        self.pipe, heard = os.pipe()
        for end in (self.pipe, heard):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(heard, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def unhurried(self) -> Iterator[None]:
        """What is done meanwhile, such as saving, may take as long as it takes."""
        self.in_step = False
        try:
            yield
        finally:
            self.asked = self.asked and time.monotonic()
            self.in_step = True

    def _watch(self) -> None:
        while True:
            if self.pulse:
                self.pulse.beat(self.rank)
            if self.asked is None and signal.SIGTERM in self._signals():
                self.asked = time.monotonic()
            if self.in_step and self.asked is not None and time.monotonic() > self.asked + PATIENCE:
                why = f"SIGTERM came {PATIENCE:.0f} s ago and the step has not ended, as when a peer or a device hangs"
                self._end("stopped", why)
            if self.peers and (lost := self.peers.lost(BEAT, self.asked is not None)) is not None:
                self._end("lost", no_sign_of(lost))
            time.sleep(BEAT)

    def _end(self, kind: exit_reason.Kind, why: str) -> None:
        print(f"{why}: what was saved before stands", flush=True)
        exit_reason.record(kind, why, self.rank)
        os._exit(ENDED if kind == "stopped" else 1)

    def _signals(self) -> bytes:
        try:
            return os.read(self.pipe, 64)
        except BlockingIOError:
            return b""

"""Ranks that no launcher of ours sees, as under srun and torchrun, look after each other: each after the next.

Every rank beats in the store that they met at and listens to the next rank's beats. The exchange has a thread of its
own, since the store's host may hang, too; that is silence like any other.
"""

from __future__ import annotations

import contextlib
import threading
import time

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from tpcheck.run.heartbeat import BEAT, is_lost
from tpcheck.run.place import Place

__all__ = ["Ring", "connected"]


class Ring:
    """One rank's part.

    Args:
        store: shared by the ranks, and by no other thread of this one.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.store = PrefixStore("beats", store)
        self.mine, self.next = str(rank), (rank + 1) % world_size
        self.beats, self.heard = 0, b""
        self.silence = 0.0  # seconds, as the listener counts them

    def exchange(self) -> None:
        """Beat, and hear whether the next rank has beaten."""
        self.beats += 1
        self.store.set(self.mine, str(self.beats))
        heard = self.store.get(str(self.next)) if self.store.check([str(self.next)]) else b""
        if heard != self.heard:
            self.heard, self.silence = heard, 0.0

    def lost(self, seconds: float, is_stopping: bool) -> int | None:
        """The next rank, if it was heard once and has been silent for too long; `seconds` since the last call."""
        if self.heard:
            self.silence += seconds
        return self.next if is_lost(self.silence, is_stopping) else None

    def go_round(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store has gone with its host
            while True:
                self.exchange()
                time.sleep(BEAT)


def connected(place: Place) -> Ring | None:
    """The rank's part of a ring that goes round until the process ends; None where the launcher sees all ranks."""
    if place.address is None or place.world_size == 1:
        return None
    host, port = place.address
    ring = Ring(TCPStore(host, port, is_master=False), place.rank, place.world_size)
    threading.Thread(target=ring.go_round, daemon=True).start()
    return ring

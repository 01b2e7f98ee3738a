"""What the watchdogs of all machines see, over torchrun's store.

Each tells what it sees of its ranks every few seconds, and reads what the others have told when a
rank of its own is late: with 1,000 machines 200 small writes a second, and no reading.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict

import torch.distributed as dist

from moss_train.train.hang_detection import RankStatus

EVERY = 3.0  # seconds between two tellings
PATIENCE = 6.0  # seconds in which the store must have answered
_HANG = "hang"  # a key: one of the machines has found that the job hangs


class Machines:
    """A connection of this process's own, in a thread: a store that does not answer (its launcher
    is stopped) must not stop the watchdog, which would continue that launcher."""

    def __init__(self, connect: Callable[[], dist.Store], number: int, count: int):
        """`connect`: makes the connection. number, count: of this machine, of all."""
        self._connect, self._number, self._count = connect, number, count
        self._own: Sequence[RankStatus] = ()
        self._all: list[RankStatus] = []
        self._read_at = -1.0  # when `_all` was read
        self._hang = False
        self._requested = threading.Event()
        self._thread = threading.Thread(target=self._share, daemon=True)
        if count > 1:
            self._thread.start()

    @classmethod
    def of_job(cls, connect: Callable[[], dist.Store]) -> Machines:
        """The machines that torchrun's environment names."""
        number = int(os.environ.get("GROUP_RANK", "0"))
        return cls(connect, number, int(os.environ.get("GROUP_WORLD_SIZE", "1")))

    def publish(self, own: Sequence[RankStatus]) -> None:
        """What this machine sees now; the others learn it within seconds."""
        self._own = own

    def all(self) -> list[RankStatus]:
        """What all machines see, of the last seconds; this one's own where the store does not
        answer in time."""
        requested_at = time.monotonic()
        self._requested.set()
        until = requested_at + PATIENCE
        while self._thread.is_alive() and self._read_at < requested_at and time.monotonic() < until:
            time.sleep(0.05)
        return self._all if self._read_at >= requested_at else list(self._own)

    def publish_hang(self) -> list[RankStatus]:
        """Tells the others that the job hangs: they write down what they see. Returns `all`."""
        self._hang = True
        return self.all()

    @property
    def hang(self) -> bool:
        """Whether a machine has said so."""
        return self._hang

    def _share(self) -> None:
        with suppress(RuntimeError, OSError):  # the job ends, or never had such a store
            store = self._connect()
            while True:
                requested = self._requested.wait(EVERY)
                if requested:  # else a request that came since would be forgotten
                    self._requested.clear()
                own = [asdict(status) for status in self._own]
                store.set(f"seen_{self._number}", json.dumps(own))
                if self._hang:
                    store.set(_HANG, "")
                if store.check([_HANG]):  # never unset: `publish_hang` may have set it meanwhile
                    self._hang = True
                if requested:
                    self._read(store)

    def _read(self, store: dist.Store) -> None:
        started = time.monotonic()
        names = [f"seen_{number}" for number in range(self._count)]
        reports = [json.loads(store.get(name)) for name in names if store.check([name])]
        self._all = [RankStatus(**row) for rows in reports for row in rows]
        self._read_at = started

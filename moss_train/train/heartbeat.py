"""Where each rank of this machine is, in files that no server keeps: /dev/shm, a page each.

A rank writes its step, what it does and the time (a microsecond); the machine's watchdog reads them
(watchdog.py). The clock is the machine's, so the times of its ranks can be compared.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_FORM = struct.Struct("<dqqqq24s")  # time, rank, process, step, beats in the step, what it does
_SIZE = 4096
FOLDERS = "moss-train-ranks-"  # what the names of all jobs' folders begin with
STACK_FILE = "stack_{}.txt"  # of a rank: Python's stacks, when the watchdog asks for them
RUN_FILE = "run"  # where the watchdog of this machine leaves what it sees of a hang


@dataclass(frozen=True)
class Heartbeat:
    """A rank's last sign of life.

    at: seconds of `time.monotonic`. count: signs in this step so far that all ranks give as often;
    of two ranks in the same step the one with fewer is behind. doing: such as `data`, `save`,
    `after forward`.
    """

    at: float
    rank: int
    pid: int
    step: int
    count: int
    doing: str


def folder_of_job() -> Path | None:
    """The folder that the ranks of this machine share; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return None
    shared = Path("/dev/shm")
    base = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return base / f"{FOLDERS}{os.getuid()}-{os.getppid()}-{again}"


class HeartbeatWriter:
    """Writes this rank's signs of life; while `counts`, they are counted."""

    def __init__(self, folder: Path, rank: int):
        self._rank, self._step, self._count = rank, 0, 0
        self.counts = True
        with (folder / f"rank_{rank}").open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, _SIZE)  # a page without memory kills who writes it
            self._page = mmap.mmap(file.fileno(), _SIZE)
        self.beat("start", 0)

    def beat(self, doing: str, step: int | None = None) -> None:
        """The rank does that now; `step`: a new one begins."""
        self._count += self.counts
        if step is not None and step != self._step:
            self._step, self._count = step, 0
        now = time.monotonic()
        values = (now, self._rank, os.getpid(), self._step, self._count, doing.encode()[:24])
        _FORM.pack_into(self._page, 0, *values)


_heart: HeartbeatWriter | None = None


def start(folder: Path, rank: int) -> None:
    """Lets `beat` write into `folder` from now on. Raises OSError where there is no space for
    it."""
    global _heart
    _heart = HeartbeatWriter(folder, rank)


def stop() -> None:
    """`beat` writes nowhere any more."""
    global _heart
    _heart = None


def beat(doing: str, step: int | None = None) -> None:
    """A sign of life of this rank, where somebody watches it."""
    if _heart is not None:
        _heart.beat(doing, step)


@contextmanager
def uncounted() -> Iterator[None]:
    """Signs of life in what some ranks do more often than others: they tell nothing about who is
    behind."""
    if _heart is None:
        yield
        return
    _heart.counts = False
    try:
        yield
    finally:
        _heart.counts = True


def read(folder: Path) -> list[Heartbeat]:
    """The last signs of life of this machine's ranks, in order of rank."""
    beats = []
    for path in folder.glob("rank_*"):
        page = path.read_bytes()
        if len(page) == _SIZE:
            at, rank, pid, step, count, doing = _FORM.unpack_from(page)
            beats.append(Heartbeat(at, rank, pid, step, count, doing.rstrip(b"\0").decode()))
    return sorted((beat for beat in beats if beat.pid), key=lambda beat: beat.rank)

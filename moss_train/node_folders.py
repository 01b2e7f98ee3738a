"""Folders on a machine, outside the run folder, for the time of a process: those of processes that
were killed are removed by the next one."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def claimed(folder: Path, how: int = fcntl.LOCK_SH) -> Iterator[None]:
    """Holds `folder`, with other processes, so that nobody removes it. The forks of a process hold
    it, too, until the last one has ended. Raises OSError where there is no such folder.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, how | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)


def remove_unclaimed(base: Path, prefix: str) -> None:
    """Removes the folders in `base` whose names begin so and that no process holds."""
    for path in base.glob(f"{prefix}*"):
        with suppress(OSError), claimed(path, fcntl.LOCK_EX):
            remove(path)


def remove(folder: Path) -> None:
    """Removes a folder, but for one with logs: torchrun keeps there what ranks print, where
    `--redirects` or `--tee` asks for that."""
    if not any(folder.rglob("*.log")):
        shutil.rmtree(folder, ignore_errors=True)

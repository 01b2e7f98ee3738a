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
def claimed(folder: Path, how: int = fcntl.LOCK_SH, *, by_forks: bool = True) -> Iterator[None]:
    """Holds `folder`, with other processes, so that nobody removes it. by_forks: the forks of a
    process hold it, too, until the last one has ended. Raises OSError where there is no such
    folder.
    """
    opened = [os.open(folder, os.O_RDONLY)]

    def let_go() -> None:
        while opened:
            os.close(opened.pop())

    try:
        fcntl.flock(opened[0], how | fcntl.LOCK_NB)
        if not by_forks:
            os.register_at_fork(after_in_child=let_go)
        yield
    finally:
        let_go()


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

"""One job at a time trains in a run folder: the one that holds the lock of its file `running`."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from moss_train.config import ConfigError
from moss_train.storage import or_warning

LOCK_FILE = "running"  # in a run folder while a job trains there; a killed job leaves it


def check_free(folder: Path) -> None:
    """Raises ConfigError where another process trains in `folder`; nothing is written."""
    with suppress(FileNotFoundError), (folder / LOCK_FILE).open("r+") as file:
        _lock(file.fileno(), folder)


@contextmanager
def running_in(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`, which exists. The system frees it when the process ends, however
    it does.

    Raises:
        ConfigError: another process has it.
    """
    path = folder / LOCK_FILE
    with ExitStack() as held:
        with or_warning(path, "a second job in this folder will not be refused"):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            held.callback(os.close, file)
            _lock(file, folder)
            held.callback(path.unlink, missing_ok=True)
            os.ftruncate(file, 0)
            os.write(file, f"{socket.gethostname()}, process {os.getpid()}\n".encode())
        yield


def _lock(descriptor: int, folder: Path) -> None:
    try:
        # Of the process, not of the open file: its workers, which are forks, do not hold it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        raise ConfigError(
            [f"run.dir={folder}: another job trains there ({holder}): choose another folder"]
        ) from None
    except OSError:
        return  # a file system without locks: nobody is refused

"""One job at a time trains in a run folder: the one that holds the lease in its file `running`.

The lease is a lock of the file, which the system frees however the process ends. A lock may hold on
one machine alone (Lustre with `localflock`), or not exist at all. So the holder also gives signs of
life: it sets the file's time every few seconds. Where a lock says nothing, a job that is about to
begin watches whether the time changes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from moss_train.config import ConfigError
from moss_train.log import log
from moss_train.storage import or_warning

LOCK_FILE = "running"  # in a run folder while a job trains there; a killed job leaves it
EVERY = 5.0  # seconds between two signs of life
STALE = 20.0  # seconds without one, after which a lease is nobody's
_stale_files: set[tuple[Path, int]] = set()  # files and their times that were watched in vain


def check_free(folder: Path) -> None:
    """Raises ConfigError where another process trains in `folder`; nothing is written.

    It takes `STALE` seconds where a job on another machine has left its file."""
    path = folder / LOCK_FILE
    with suppress(FileNotFoundError), path.open("r+") as file:
        _take(file.fileno(), path)


@contextmanager
def running_in(folder: Path) -> Iterator[None]:
    """Holds the lease of `folder`, which exists.

    Raises:
        ConfigError: another process has it.
    """
    path = folder / LOCK_FILE
    with ExitStack() as held:
        with or_warning(path, "a second job in this folder will not be refused"):
            file = _open_locked(path)
            held.callback(os.close, file)
            held.callback(path.unlink, missing_ok=True)
            os.ftruncate(file, 0)
            job = os.environ.get("SLURM_JOB_ID")
            of = f", Slurm job {job}" if job else ""
            os.write(file, f"{socket.gethostname()}, process {os.getpid()}{of}\n".encode())
            ended = threading.Event()
            alive = threading.Thread(target=_give_signs, args=(file, ended), daemon=True)
            alive.start()
            held.callback(alive.join)
            held.callback(ended.set)
        yield


def _give_signs(file: int, ended: threading.Event) -> None:
    while not ended.wait(EVERY):
        with suppress(OSError):  # a storage that fails now and then
            os.utime(file)


def _open_locked(path: Path) -> int:
    """The file, opened and locked: a new one where its holder has removed it meanwhile. Raises
    ConfigError."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(file, path)
            if _has_name(file, path):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _has_name(file: int, path: Path) -> bool:
    """Whether an open file is still the one of this name. How many names it has does not tell: a
    copy by links may be another one, and some file systems do not count them."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise


def _take(file: int, path: Path) -> None:
    """Locks the file, if nobody else has it. Raises ConfigError."""
    locked, holder = _lock(file, path), _holder(file)
    ours = holder.startswith(f"{socket.gethostname()},")
    if holder and not (locked and ours) and _changes(path, holder):
        raise _lock_error(path, holder)
    _lock(file, path)  # again: a process that closes a file loses its locks, and `_changes` does


def _lock(file: int, path: Path) -> bool:
    """Whether there are locks. Raises ConfigError where another process has this one."""
    try:
        # Of the process, not of the open file: its workers, which are forks, do not hold it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _lock_error(path, _holder(file)) from None
    except OSError:
        return False  # a file system without locks
    return True


def _changes(path: Path, holder: str) -> bool:
    """Whether the file gets a sign of life within `STALE` seconds; not where its holder removes
    it."""
    with suppress(FileNotFoundError):
        return _is_touched(path, holder)
    return False


def _is_touched(path: Path, holder: str) -> bool:
    first = path.stat().st_mtime_ns
    if (path, first) in _stale_files:
        return False
    log.info("%s: does that job (%s) still live? %g s", path, holder, STALE)
    until, over = time.monotonic() + STALE, False
    while not over:
        time.sleep(0.5)
        over = time.monotonic() >= until  # and a last look
        # A network file system asks its server for the time of a file that is opened.
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mtime_ns != first:
                return True
    _stale_files.add((path, first))
    return False


def _holder(file: int) -> str:
    return os.pread(file, 200, 0).decode(errors="replace").strip()


def _lock_error(path: Path, holder: str) -> ConfigError:
    return ConfigError(
        [f"run.dir={path.parent}: another job trains there ({holder}): choose another folder"]
    )

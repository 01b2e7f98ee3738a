"""Files and folders that have their name only when they are complete and on disk.

Until then they are called `NAME.partial` (a folder: `.NAME.partial`, beside it): whatever kills the
writer leaves the old file or a partial name, never something short that looks whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PARTIAL_SUFFIX = ".partial"


def partial_path(path: Path) -> Path:
    """Where a file is written until it is complete: `NAME.partial`."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def publish(partial: Path) -> Path:
    """Brings a complete `NAME.partial` to the disk and gives it its name, which is returned."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    return partial.replace(partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX)))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes or replaces a whole file: afterwards it is the new one, or, after an error, the old.

    A text becomes UTF-8; what UTF-8 has no bytes for becomes an escape (`\\udc80`).
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        publish(partial)
    except OSError:  # a full disk: what was written of it takes space, too
        partial.unlink(missing_ok=True)
        raise


def unlock(lock: int | IO[Any]) -> None:
    """Gives a lock of `fcntl.flock` back. To close its file is not enough where this process has
    forked meanwhile: the fork has the file, too, and would hold the lock until it ends."""
    fcntl.flock(lock, fcntl.LOCK_UN)


class FolderInUse(ValueError):
    """A folder that cannot be written: it exists, or another process is writing it."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, `.OUT.partial`, which becomes `out` when all went well.

    It is removed after an error; what a killed process left there is removed by the next. Raises
    FolderInUse.
    """
    if out.exists() or out.is_symlink():
        raise FolderInUse(f"{out}: exists: choose another folder, or remove it")
    partial = out.absolute().parent / f".{out.name}{PARTIAL_SUFFIX}"
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise FolderInUse(f"{out}: another process is writing it") from None
    try:
        _empty(partial)
        yield partial
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _empty(partial: Path) -> None:
    leftovers = list(partial.iterdir())
    if leftovers:
        print(f"removing {partial}, left by a process that was killed", file=sys.stderr)
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()

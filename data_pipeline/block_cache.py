"""A folder of blocks of bytes, bounded, which all processes of a machine share.

A block has its name only when it is whole. The least recently used blocks are removed where others
would not fit. What cannot be written is not kept, and whatever is missing is fetched again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.atomic import PARTIAL_SUFFIX, unlock

logger = logging.getLogger(__name__)

_KEPT = 0.9  # of the bound when blocks have gone, so that it does not happen at each one
_STALE = 600.0  # seconds after which an unfinished block was a killed process's


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"moss_train_cache_{os.getuid()}"


class BlockCache:
    """A cache of at most `most` bytes below `folder`; 0: nothing is kept."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._warned = False

    def get(self, name: str, length: int) -> bytes | None:
        """The block of `length` bytes called `name`; None: it is not there."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if len(data) != length:  # the machine went down before it was on disk
            return None
        with suppress(OSError):
            os.utime(path)  # now the one used last
        return data

    def put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        if len(data) > self._most:
            return
        try:
            with self._total() as total:
                if not path.exists():
                    self._write(path, data, total)
        except OSError as error:
            if not self._warned:
                logger.warning("the cache %s cannot be written: %s", self._folder, error)
            self._warned = True

    def _write(self, path: Path, data: bytes, total: int) -> None:
        """Writes a block and the new total. The caller holds the lock, which bounds the folder,
        whoever else writes."""
        length = str(total + len(data))
        if total < 0 or total + len(data) > self._most:
            length = str(self._make_room(len(data)) + len(data))
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        # Before the block: a process that is killed in between leaves too large a number.
        (self._folder / ".total").write_text(length)
        partial.write_bytes(data)
        partial.rename(path)

    def _make_room(self, needed: int) -> int:
        """Removes the oldest blocks; the bytes of those that stay."""
        blocks: list[tuple[float, int, Path]] = []
        for path in self._folder.glob("??/*"):
            with suppress(FileNotFoundError):
                about = path.stat()
                blocks.append((about.st_mtime, about.st_size, path))
        total = sum(size for _, size, _ in blocks)
        goal = int(self._most * _KEPT) if total + needed > self._most else self._most
        for when, size, path in sorted(blocks):
            unfinished = path.suffix == PARTIAL_SUFFIX and when < time.time() - _STALE
            if total + needed > goal or unfinished:
                path.unlink(missing_ok=True)
                total -= size
        return total

    @contextmanager
    def _total(self) -> Iterator[int]:
        """The lock of the folder, and the bytes in it; -1: they are not known."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                total = -1
                with suppress(FileNotFoundError, ValueError):
                    total = int((self._folder / ".total").read_text())
                yield total
            finally:
                unlock(lock)

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / name

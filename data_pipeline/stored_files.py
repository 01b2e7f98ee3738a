"""Files of object stores by ranges of bytes, through the local cache.

What is asked for is fetched in blocks, neighbors in one request. `BlockCache` says what of them
stays: a block's name holds the file's size and version, so that a file that is replaced is read
anew.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypeVar

from data_pipeline import stores
from data_pipeline.block_cache import BlockCache, default_folder
from data_pipeline.stores import StoreOptions

BLOCK = 1 << 20  # bytes
AT_ONCE = 8  # requests at the same time, of a process; blocks of a file that is read on and on
_FILES = 1024  # files whose sizes are kept

_Item = TypeVar("_Item")


class StoredFile(NamedTuple):
    url: str
    size: int
    name: str  # of this file and what is in it now


class StoredFiles:
    """The files in object storage that this process reads. May be called from several threads."""

    def __init__(self, options: StoreOptions) -> None:
        self.options = options
        stores.set_timeout(options.timeout)
        folder = Path(os.path.expanduser(options.cache)) if options.cache else default_folder()
        self._cache = BlockCache(folder, int(options.cache_size * 1e9))
        self._lock = threading.Lock()
        self._files: OrderedDict[str, StoredFile] = OrderedDict()

    def about(self, url: str) -> StoredFile:
        """Raises StoreError, GoneError."""
        with self._lock:
            if url in self._files:
                self._files.move_to_end(url)
                return self._files[url]
        size, version = stores.describe(url, self.options.retries)
        name = blake2b(f"{url} {size} {version}".encode(), digest_size=16).hexdigest()
        file = StoredFile(url, size, name)
        with self._lock:
            self._files[url] = file
            while len(self._files) > _FILES:
                self._files.popitem(last=False)
        return file

    def forget(self, url: str) -> None:
        """A file may be another one now."""
        with self._lock:
            self._files.pop(url, None)

    def read(self, file: StoredFile, first: int = 0, end: int | None = None) -> bytes:
        """Bytes `first` up to `end` of a file, or to its end. Raises StoreError, GoneError."""
        end = file.size if end is None else end
        numbers = range(first // BLOCK, -(-end // BLOCK))
        blocks = {n: self._cache.get(f"{file.name}-{n}", _length(n, file.size)) for n in numbers}
        for run in _runs([n for n, block in blocks.items() if block is None]):
            start, stop = run[0] * BLOCK, min((run[-1] + 1) * BLOCK, file.size)
            data = stores.read(file.url, start, stop, self.options.retries)
            for n in run:
                block = data[n * BLOCK - start : (n + 1) * BLOCK - start]
                blocks[n] = block
                self._cache.put(f"{file.name}-{n}", block)
        whole = b"".join(block for block in blocks.values() if block is not None)
        return whole[first - numbers.start * BLOCK : end - numbers.start * BLOCK]

    def open(self, url: str) -> io.BufferedReader:
        """A file to read from; where it is read on and on, AT_ONCE blocks are one request."""
        return io.BufferedReader(_Stream(self, self.about(url)), BLOCK)


class _Stream(io.RawIOBase):
    def __init__(self, files: StoredFiles, file: StoredFile) -> None:
        self._files, self._file = files, file
        self._at, self._first, self._data = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        inside = self._at - self._first
        if not 0 <= inside < len(self._data):
            on = self._at == self._first + len(self._data) and self._at > 0
            end = min(self._at + (AT_ONCE * BLOCK if on else len(buffer)), self._file.size)
            if self._at >= end:
                return 0
            self._data = self._files.read(self._file, self._at, end)
            self._first, inside = self._at, 0
        piece = self._data[inside : inside + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def _length(block: int, size: int) -> int:
    return min(BLOCK, size - block * BLOCK)


def _runs(numbers: list[int]) -> list[list[int]]:
    """Numbers that follow each other, together."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs

"""Storage that fails now and then: what is damaged, what only does not answer, what ends no job.

A file that is not there, or is not what was written, is damage. Any other error of the operating
system (a server that does not answer, a stale handle, no permission) says nothing about the files:
it is tried again, then it ends the job.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from moss_train.log import log, print_line

NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
WAITS = (0.5, 1.0, 2.0)  # seconds before the second, third and fourth try
_PIECE = 1 << 22  # bytes
_THREADS = 4  # zlib works without Python's lock
T = TypeVar("T")


class StorageError(RuntimeError):
    """The storage did not answer, several times, or does not take what a job cannot do without."""


def patiently(read: Callable[[], T], path: Path) -> T:
    """What `read` returns, tried again after errors of the storage at `path`.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: at once.
        StorageError: the storage failed each time.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except NOT_THERE:
            raise
        except OSError as error:
            if wait is None:
                raise StorageError(
                    f"{path}: cannot be read, {len(WAITS) + 1} times ({error}): nothing was "
                    "changed; start again when the storage answers"
                ) from error
            log.warning("%s: cannot be read (%s): again in %g s", path, error, wait)
            time.sleep(wait)
    raise AssertionError


@contextmanager
def or_warning(what: object, then: str = "training goes on without it") -> Iterator[None]:
    """Turns an error of the operating system into a warning, on any rank: for files that training
    can do without, which a checkpoint's are not."""
    try:
        yield
    except OSError as error:
        print_line(f"{what} cannot be written ({error}): {then}")


def checksum(path: Path) -> str:
    """The CRC-32 of a file, as zlib computes it: 8 hexadecimal digits."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"


def describe_files(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, int | str]]:
    """`{name relative to `folder`: {"size": bytes, "crc32": checksum}}`."""
    ordered = sorted(files)
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(checksum, ordered)
        return {
            str(path.relative_to(folder)): {"size": path.stat().st_size, "crc32": value}
            for path, value in zip(ordered, sums, strict=True)
        }

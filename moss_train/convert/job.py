"""How a conversion runs: a folder that appears when it is complete, workers, memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from torch import Tensor

from data_pipeline import atomic
from data_pipeline.commands import one_line
from moss_train.convert.source import ConversionError

MANIFEST = "manifest.json"
SPARE = 64 * 2**20  # bytes on disk beyond the weights: tokenizer, headers, metadata
PIECE = 16 * 2**20  # bytes hashed or written at once
Job = TypeVar("Job")


@contextmanager
def new_folder(out: Path, size: int) -> Iterator[Path]:
    """A folder to write `size` bytes of weights into, which becomes `out` when all went well.

    Raises:
        ConversionError: `out` exists, someone else writes it, or the disk has too little room.
    """
    try:
        with atomic.new_folder(out) as partial:
            check_disk(partial.parent, size)
            yield partial
    except atomic.FolderInUse as error:
        raise ConversionError(str(error)) from None


def check_disk(folder: Path, size: int) -> None:
    """Raises ConversionError where `size` bytes, and a little, do not fit."""
    free = shutil.disk_usage(folder).free
    if free < size + SPARE:
        raise ConversionError(
            f"{folder}: has {free / 1e9:.1f} GB free, the conversion needs "
            f"{(size + SPARE) / 1e9:.1f} GB: make room, or write to another disk"
        )


class MemoryBudget:
    """Lends bytes to workers, at most `limit` at once; one job alone may have more."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.changed = threading.Condition()

    @contextmanager
    def lend(self, size: int) -> Iterator[None]:
        """Waits until `size` bytes are free."""
        with self.changed:
            self.changed.wait_for(lambda: self.used == 0 or self.used + size <= self.limit)
            self.used += size
        try:
            yield
        finally:
            with self.changed:
                self.used -= size
                self.changed.notify_all()


class FiniteCheck:
    """Counts NaN and infinite numbers by tensor, where `active`; refuses them at the end."""

    def __init__(self, active: bool):
        self.active, self.lock = active, threading.Lock()
        self.counts: dict[str, int] = {}  # by tensor

    def add(self, name: str, tensor: Tensor) -> None:
        """Counts those of one tensor, or of a part of it."""
        if not self.active or not tensor.is_floating_point():
            return
        count = tensor.numel() - int(tensor.isfinite().sum())
        if count:
            with self.lock:
                self.counts[name] = self.counts.get(name, 0) + count

    def finish(self, source: Path) -> None:
        """Raises ConversionError with a line for each tensor that is not finite."""
        if self.counts:
            lines = [f"{name}: {n} numbers are NaN or infinite" for name, n in self.counts.items()]
            raise ConversionError("\n".join([f"{source}: has weights that are not finite", *lines]))


_stopping = threading.Event()  # set: files that are being written go no further


def run_workers(jobs: Sequence[Job], work: Callable[[Job], Any], workers: int) -> list[Any]:
    """`work` on every job, on threads (reading, copying, hashing and writing leave Python free).

    After the first error, or an interrupt, what is being written stops, and the error is raised.
    """
    _stopping.clear()
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            _stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class HashedFile:
    """A new file whose SHA-256 is known when it is closed: written once, in order.

    error: why the last write failed, which torch.save hides behind an error of its own.
    """

    def __init__(self, path: Path):
        self.file: BinaryIO = path.open("wb", buffering=0)
        self.hash, self.position = hashlib.sha256(), 0
        self.error: OSError | ConversionError | None = None

    def write(self, data: Any) -> int:
        """Appends bytes."""
        try:
            return self._write(memoryview(data).cast("B"))
        except (OSError, ConversionError) as error:
            self.error = error
            raise

    def _write(self, view: memoryview) -> int:
        for start in range(0, len(view), PIECE):
            if _stopping.is_set():
                raise ConversionError("stopped")
            piece = view[start : start + PIECE]
            self.hash.update(piece)
            while piece:
                piece = piece[self.file.write(piece) :]
        self.position += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.position

    def flush(self) -> None:
        """Does nothing: the file is not buffered."""

    def close(self) -> str:
        """Brings it to the disk; the hash, in hex."""
        os.fsync(self.file.fileno())
        self.file.close()
        return self.hash.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, hashes: dict[str, str], facts: dict[str, Any]) -> None:
    """Writes manifest.json: size and SHA-256 of every file, and `facts` about the conversion.

    `hashes`: those that need not be computed again.
    """
    files = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": hashes.get(str(path.relative_to(folder))) or sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n")


def check_manifest(folder: Path) -> list[str]:
    """A line for every file that is not what manifest.json says."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{folder / MANIFEST}: cannot be read: {one_line(error)}"]
    problems = []
    for name, recorded in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: is missing")
        elif path.stat().st_size != recorded["bytes"]:
            problems.append(f"{path}: has {path.stat().st_size} bytes, not {recorded['bytes']}")
        elif sha256(path) != recorded["sha256"]:
            problems.append(f"{path}: its SHA-256 is not {recorded['sha256']}")
    return problems

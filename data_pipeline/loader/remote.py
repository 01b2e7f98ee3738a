"""Samples of shards in object stores: read by their own bytes, ahead of their turn, kept on disk.

Of a shard its index and the bytes of the samples that are asked for are fetched
(data_pipeline/stored_files.py).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline import stores
from data_pipeline.loader.reader import OpenShards, Shards, SourceReader, bounds
from data_pipeline.shards import training_shards
from data_pipeline.stored_files import AT_ONCE, StoredFile, StoredFiles
from data_pipeline.stores import StoreOptions, is_url

_OPEN = 128  # shards whose offsets are kept


class _Shard(NamedTuple):
    file: StoredFile
    offsets: NDArray[np.uint64]


class RemoteShards:
    """The shards of stores that this process reads; it may be called from several threads."""

    def __init__(self, options: StoreOptions) -> None:
        self._files = StoredFiles(options)
        self._lock = threading.Lock()
        self._shards: OrderedDict[str, _Shard] = OrderedDict()
        self._coming: dict[tuple[str, int], Future[bytes]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def read(self, shard: str, place: int) -> bytes:
        """The bytes of a shard's sample. Raises StoreError, GoneError, ValueError."""
        coming = self._coming.pop((shard, place), None) if self._process == os.getpid() else None
        return coming.result() if coming else self._fetch(shard, place)

    def ahead(self, shard: str, place: int) -> None:
        """A sample is read soon: its bytes are fetched meanwhile."""
        if self._threads is None or self._process != os.getpid():  # threads do not follow a fork
            self._threads, self._process = ThreadPoolExecutor(AT_ONCE), os.getpid()
            self._coming = {}
        if (shard, place) not in self._coming:
            self._coming[shard, place] = self._threads.submit(self._fetch, shard, place)

    def close(self, shard: str) -> None:
        """Forgets a shard, which may be another one now."""
        with self._lock:
            self._shards.pop(shard, None)
        self._files.forget(shard)

    def _fetch(self, shard: str, place: int) -> bytes:
        file, offsets = self._opened(shard)
        return self._files.read(file, *bounds(offsets, place, shard, file.size))

    def _opened(self, shard: str) -> _Shard:
        with self._lock:
            if shard in self._shards:
                self._shards.move_to_end(shard)
                return self._shards[shard]
        file = self._files.about(shard)
        index = stores.read(f"{shard}.idx", retries=self._files.options.retries)
        opened = _Shard(file, np.frombuffer(index, "<u8"))
        with self._lock:
            self._shards[shard] = opened
            while len(self._shards) > _OPEN:
                self._shards.popitem(last=False)
        return opened


class AnyShards:
    """Shards of folders and of stores, as their paths are."""

    def __init__(self, options: StoreOptions) -> None:
        self._options, self._local = options, OpenShards()
        self._remote: RemoteShards | None = None  # opened by the process that reads

    def read(self, shard: str, place: int) -> bytes:
        return self._of(shard).read(shard, place)

    def ahead(self, shard: str, place: int) -> None:
        self._of(shard).ahead(shard, place)

    def close(self, shard: str) -> None:
        self._of(shard).close(shard)

    def _of(self, shard: str) -> Shards:
        if not is_url(shard):
            return self._local
        self._remote = self._remote or RemoteShards(self._options)
        return self._remote


def samples_in_order(
    path: str, options: StoreOptions, first: int = 0, most: int | None = None, step: int = 1
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and undecoded members of samples `first`, `first + step`, ... of a folder in a store, of
    its first `most`, as `read_samples` gives those of a local one. Raises ShardError, StoreError.
    """
    reader = SourceReader(path, path, training_shards(path), AnyShards(options))
    numbers = range(first, len(reader) if most is None else min(most, len(reader)), step)
    for place, sample in enumerate(numbers):
        for later in numbers[place : place + 1 + options.read_ahead]:
            reader.ahead(later)
        yield reader.read(sample)

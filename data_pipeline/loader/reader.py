"""Reads a sample by its number: the bytes that the index of its shard says, as members by name."""

from __future__ import annotations

import io
import os
import re
import tarfile
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from data_pipeline.shards import ShardError
from data_pipeline.stores import GoneError, StoreError
from data_pipeline.tar_members import extents_of, stored_size, with_holes

_OPEN = 128  # shards of a process that stay open, of all sources
_COMMENT = re.compile(r"__[^/]*__(/|$)")  # members in which webdataset keeps notes


class OpenShards:
    """Shards that are open in this process, with the offsets of their samples; the last used. They
    are closed when nobody holds this any more."""

    def __init__(self, at_once: int = 1 << 30) -> None:
        """`at_once`: bytes of a read at most: Linux gives no more than 2,147,479,552."""
        self._at_once = at_once
        self._open: dict[str, tuple[io.FileIO, NDArray[np.uint64]]] = {}

    def read(self, shard: str, place: int) -> bytes:
        """The bytes of a shard's sample. Raises OSError, ValueError: they are not there."""
        kept = self._open.pop(shard) if shard in self._open else self._opened(shard)
        self._open[shard] = file, offsets = kept  # now the last one
        size = os.fstat(file.fileno()).st_size
        first, end = bounds(offsets, place, os.path.basename(shard), size)
        places = range(first, end, self._at_once)
        pieces = [os.pread(file.fileno(), min(self._at_once, end - at), at) for at in places]
        return b"".join(pieces) if len(pieces) > 1 else pieces[0]

    def ahead(self, shard: str, place: int) -> None:
        """A sample is read soon: a disk's own cache is good enough."""

    def close(self, shard: str) -> None:
        """Forgets a shard: a broken handle would fail again, an old one would hide a new file."""
        if shard in self._open:
            self._open.pop(shard)[0].close()

    def _opened(self, shard: str) -> tuple[io.FileIO, NDArray[np.uint64]]:
        while len(self._open) >= _OPEN:
            self.close(next(iter(self._open)))
        offsets = np.fromfile(f"{shard}.idx", "<u8")
        return io.FileIO(shard), offsets


def bounds(offsets: NDArray[np.uint64], place: int, shard: str, size: int) -> tuple[int, int]:
    """Where sample `place` begins and ends in a shard of `size` bytes, by its index. Raises
    ValueError: the index does not have it."""
    if place + 1 >= len(offsets):
        raise ValueError(f"{shard}.idx ends before sample {place}")
    first, end = int(offsets[place]), int(offsets[place + 1])
    if not first < end <= size:
        raise ValueError(f"the sample lies at {first}..{end} of {size} bytes")
    return first, end


class Shards(Protocol):
    """Shards of folders (OpenShards) or of object stores (RemoteShards)."""

    def read(self, shard: str, place: int) -> bytes: ...

    def ahead(self, shard: str, place: int) -> None: ...

    def close(self, shard: str) -> None: ...


class SourceReader:
    """The samples of a folder of shards, numbered through all of them."""

    def __init__(self, name: str, folder: str, counts: dict[str, int], opened: Shards) -> None:
        """`counts`: samples of each shard, as in `training_shards`."""
        self.name, self._folder, self._shards = name, folder.rstrip("/"), opened
        self._names = list(counts)
        self.counts = np.array(list(counts.values()), np.int64)
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, sample: int) -> tuple[str, int]:
        """The shard of a sample, and its place there."""
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return self._names[shard], sample - int(self._ends[shard] - self.counts[shard])

    def read(self, sample: int) -> tuple[str, dict[str, bytes]]:
        """Key and undecoded members (`json`, `0.jpg`, ...) of a sample.

        Raises ShardError where it cannot be read, for whatever reason; StoreError where its store
        cannot be reached.
        """
        shard, place = self._shard(sample)
        try:
            return members(self._shards.read(shard, place))
        except MemoryError:
            raise
        except StoreError as error:
            if not isinstance(error, GoneError):
                raise
            raise ShardError(str(error)) from None
        except Exception as error:  # of any kind, from tarfile on damaged data
            self._shards.close(shard)
            raise ShardError(f"{type(error).__name__}: {error}") from None

    def ahead(self, sample: int) -> None:
        """A sample is read soon."""
        self._shards.ahead(*self._shard(sample))

    def _shard(self, sample: int) -> tuple[str, int]:
        name, place = self.place(sample)
        return f"{self._folder}/{name}", place


def members(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and members of the one sample that `data`, a piece of a tar, holds.

    Raises ValueError, TarError.
    """
    key: str | None = None
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for entry in tar:
            prefix, name = base_plus_ext(entry.name)
            if not entry.isreg() or prefix is None or _COMMENT.match(entry.name):
                continue
            if key not in (None, prefix):
                raise ValueError(f"members of two samples, {key} and {prefix}")
            key = prefix
            extents = extents_of(entry)
            end = entry.offset_data + stored_size(entry.size, extents)
            if end > len(data):
                raise ValueError(f"{entry.name} is cut off")
            found[name] = with_holes(data[entry.offset_data : end], entry.size, extents)
        if tar.offset < len(data):  # tarfile takes a header that it cannot read for the end
            raise ValueError(f"no member is at byte {tar.offset} of the sample")
    if key is None:
        raise ValueError("no members of a sample are there")
    return key, found

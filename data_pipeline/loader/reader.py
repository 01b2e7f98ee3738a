"""Reads samples from indexed shards; one that cannot be read becomes a marked sample.

energon ends a stream at the first tar that has been cut off, damaged or deleted since it was
indexed. Here the task (task.py) gets the marked sample, and counts, logs and skips it.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from megatron.energon import CrudeWebdataset
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader

UNREADABLE = "__unreadable__"  # a member of a marked sample: why it could not be read


class ShardSource(CrudeWebdataset):
    """energon's indexed folder of shards, with tolerant readers."""

    def build(self, worker_rotation_offset: int = 0) -> Any:
        dataset = super().build(worker_rotation_offset)
        loader = dataset.dataset
        loader.join_readers = [TolerantReader(reader) for reader in loader.join_readers]
        return dataset


class TolerantReader:
    """energon's reader of samples by their number, with marked samples for those it cannot read."""

    def __init__(self, reader: ShardInfosITarReader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        try:
            return self._reader[index]
        except MemoryError:
            raise
        except Exception as error:  # of any kind, from tarfile on damaged data
            self._forget()
            return self._unreadable(index, error)

    def _forget(self) -> None:
        """Closes open files: a broken handle would fail again, an old one would hide a new file."""
        self._reader.close()
        self._reader.cached_offset_reader.tar_index_reader_cache.clear()

    def _unreadable(self, index: int, error: Exception) -> dict[str, Any]:
        """The marked sample. Its key, which cannot be read, is its place in the shard."""
        reader = self._reader
        number = bisect_right(reader.shard_count_cumsum, index) - 1
        place = index - reader.shard_count_cumsum[number]
        shard = reader.shard_infos[number].name
        return {
            "__key__": f"{shard}#{place}",
            "__shard__": shard,
            "__restore_key__": ("Webdataset", index),
            "__sources__": (),
            UNREADABLE: f"{type(error).__name__}: {error}",
        }

"""Finds sources below a folder, and single samples in them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.importers.webdataset import read_samples
from data_pipeline.schema import SampleError
from data_pipeline.shards import INDEX_FOLDER, ShardError, shard_files


@dataclass(frozen=True)
class StoredSample:
    """A sample as it is in its shard: its members by name, without the key."""

    key: str
    shard: Path
    parts: dict[str, bytes]
    error: SampleError | None = None  # why its members cannot be read


def find_sources(root: str | Path) -> list[Path]:
    """All folders with shards at or below `root`. ShardError: there is none."""
    top = Path(root)
    if not top.is_dir():
        raise ShardError(f"{top} is not a folder: correct the path")
    sources = sorted({shard.parent for shard in top.rglob("*.tar")})
    if not sources:
        raise ShardError(f"{top}: no .tar shards there or below: build them or correct the path")
    return sources


def stored_samples(shard: Path) -> Iterator[StoredSample]:
    """Yields a shard's samples. Raises DAMAGE of data_pipeline.importers.archive where it is
    torn."""
    for parts in read_samples(str(shard)):
        key = parts.pop("__key__")
        yield StoredSample(key, shard, parts, parts.pop("__error__", None))


def indexed_counts(source: Path) -> dict[str, int]:
    """The number of samples of each shard in the index; empty without a readable index."""
    try:
        info = json.loads((source / INDEX_FOLDER / ".info.json").read_text())
        return {str(name): int(count) for name, count in info["shard_counts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def find_sample(source: Path, name: str) -> StoredSample:
    """The sample of a key, or of a number from 0. ShardError: there is no such sample."""
    shards = shard_files(source)
    return _by_number(shards, int(name)) if name.isdigit() else _by_key(shards, name)


def _by_number(shards: list[Path], number: int) -> StoredSample:
    counts = indexed_counts(shards[0].parent)
    seen = 0
    for shard in shards:
        if seen + counts.get(shard.name, number + 1) <= number:  # unknown: it must be read
            seen += counts[shard.name]
            continue
        for sample in stored_samples(shard):
            if seen == number:
                return sample
            seen += 1
    raise ShardError(f"{shards[0].parent}: no sample {number}: it has {seen}, the first is 0")


def _by_key(shards: list[Path], key: str) -> StoredSample:
    for shard in shards:
        with tarfile.open(shard) as tar:
            held = any(name.startswith(f"{key}.") for name in tar.getnames())
        if held:
            return next(sample for sample in stored_samples(shard) if sample.key == key)
    raise ShardError(f"{shards[0].parent}: no sample with the key {key}")

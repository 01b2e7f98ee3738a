"""WebDataset shards on disk: writing them so that only finished ones have a shard's name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset

INDEX_FOLDER = ".nv-meta"  # where energon keeps a folder's index
PARTIAL_SUFFIX = ".partial"
# Written last by prepare_index: its presence says that the index is whole.
INDEX_MARK = "dataset.yaml"


class ShardError(ValueError):
    """A folder of shards that cannot be used; the text says which and what to do."""


@dataclass(frozen=True)
class SourceInfo:
    shards: int
    samples: int


def write_shards(
    samples: Iterable[Mapping[str, Any]],
    out_dir: str | Path,
    samples_per_shard: int = 1000,
    max_bytes: int = 1 << 30,
    prefix: str = "shard",
) -> list[Path]:
    """Writes samples into `PREFIX-000000.tar`, ... and returns the paths.

    A sample is a mapping with `__key__`, `json` (an object) and its media as bytes (`0.jpg`).
    A shard carries the name `*.tar.partial` until it is complete and synced: whatever kills the
    writer leaves whole shards or partial names, never a short shard that looks whole. Raises
    ShardError for a folder that has shards, no samples, a bad key or a key used twice.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.tar")):
        raise ShardError(f"{out} already holds shards: remove it or choose another folder")
    for leftover in out.glob(f"*.tar{PARTIAL_SUFFIX}"):
        leftover.unlink()
    finished: list[Path] = []
    writer = webdataset.ShardWriter(
        str(out / f"{prefix}-%06d.tar{PARTIAL_SUFFIX}"),
        maxcount=samples_per_shard,
        maxsize=max_bytes,
        post=lambda name: finished.append(_finish(Path(name))),
        verbose=0,
        mtime=0,  # the same samples make the same bytes
    )
    keys: set[str] = set()
    for sample in samples:
        writer.write(_checked(sample, keys))
    if not keys:
        raise ShardError(f"{out}: there were no samples to write")
    # Not in a `finally` or `with`: an exception must not turn the open shard into a finished one.
    writer.close()
    return finished


def _finish(partial: Path) -> Path:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    return partial.replace(partial.with_name(partial.name.removesuffix(PARTIAL_SUFFIX)))


def _checked(sample: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    key = sample.get("__key__")
    if not isinstance(key, str) or not key or "." in key or key.startswith("__"):
        raise ShardError(f"__key__: {key!r}: must be a text without dots, not starting with __")
    if key in keys:
        raise ShardError(f"__key__: {key!r} is used twice")
    keys.add(key)
    members = dict(sample)
    if not isinstance(members.get("json"), bytes):
        members["json"] = json.dumps(members.get("json"), ensure_ascii=False).encode()
    return members


def shard_files(path: str | Path) -> list[Path]:
    """The finished shards of a folder by name; ShardError where there are none."""
    folder = Path(path)
    if not folder.is_dir():
        raise ShardError(f"{folder} does not exist: build the shards or correct the path")
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ShardError(f"{folder} holds no .tar shards: build them or correct the path")
    return shards


def read_samples(path: str | Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and undecoded members (`json`, `0.jpg`, ...) of each sample of a folder, in order."""
    shards = [str(shard) for shard in shard_files(path)]
    # All shards on whatever rank asks: webdataset would refuse to guess in a job of several.
    for raw in webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=lambda urls: urls):
        yield raw["__key__"], {n: data for n, data in raw.items() if not n.startswith("__")}


def check_source(path: str | Path) -> SourceInfo:
    """Checks, reading no shard, that a folder can be loaded; ShardError says what is wrong."""
    folder = Path(path)
    names = {shard.name for shard in shard_files(folder)}
    prepare = f"run `python -m data_pipeline.index {folder}`"
    index = folder / INDEX_FOLDER
    info = index / ".info.json"
    needed = (index / INDEX_MARK, index / "split.yaml", index / "index.sqlite", info)
    if not all(file.is_file() for file in needed):
        raise ShardError(f"{folder} has no complete index: {prepare}")
    try:
        counts: dict[str, int] = json.loads(info.read_text())["shard_counts"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{info} cannot be read ({error}): {prepare}") from None
    changed = sorted(names.symmetric_difference(counts))
    if changed:
        raise ShardError(f"{folder}: the index does not match the shards ({changed[0]}): {prepare}")
    return SourceInfo(shards=len(counts), samples=sum(counts.values()))

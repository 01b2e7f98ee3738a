"""WebDataset shards on disk: writing them so that only finished ones have a shard's name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset
import yaml
from braceexpand import braceexpand

from data_pipeline import stores
from data_pipeline.atomic import PARTIAL_SUFFIX, partial_path, publish
from data_pipeline.stores import GoneError, StoreError, is_url

INDEX_FOLDER = ".nv-meta"  # where energon keeps a folder's index
# Written last by prepare_index: its presence says that the index is whole.
INDEX_MARK = "dataset.yaml"


class ShardError(ValueError):
    """A folder of shards that cannot be used; the text says which and what to do."""


@dataclass(frozen=True)
class SourceInfo:
    shards: int
    samples: int


class ShardWriter:
    """Writes samples into `PREFIX-000000.tar`, ..., the first with number `first`.

    A shard carries the name `*.tar.partial` until it is complete and synced: whatever kills the
    writer leaves whole shards or partial names, never a short shard that looks whole. A shard is
    complete with `samples_per_shard` samples, or as soon as it holds `max_bytes` of data.
    """

    def __init__(
        self,
        folder: str | Path,
        samples_per_shard: int = 1000,
        max_bytes: int = 1 << 30,
        prefix: str = "shard",
        first: int = 0,
    ) -> None:
        self._folder, self._prefix, self._number = Path(folder), prefix, first
        self._samples_per_shard, self._max_bytes = samples_per_shard, max_bytes
        self._tar: webdataset.TarWriter | None = None
        self._samples = self._bytes = 0

    def write(self, sample: Mapping[str, Any]) -> Path | None:
        """Adds a sample; the shard that it completed, if it did. ShardError for a bad key."""
        members = _checked(sample)
        if self._tar is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # mtime: the same samples make the same bytes
            self._tar = webdataset.TarWriter(str(self._partial()), mtime=0)
        self._bytes += self._tar.write(members)
        self._samples += 1
        full = self._samples >= self._samples_per_shard or self._bytes >= self._max_bytes
        return self.finish() if full else None

    def finish(self) -> Path | None:
        """Completes the open shard, if there is one. Not for a `finally` or `with`: an exception
        must not turn the open shard into a finished one."""
        if self._tar is None:
            return None
        self._tar.close()
        finished = publish(self._partial())
        self._tar, self._samples, self._bytes = None, 0, 0
        self._number += 1
        return finished

    def _partial(self) -> Path:
        return partial_path(self._folder / f"{self._prefix}-{self._number:06d}.tar")


def write_shards(
    samples: Iterable[Mapping[str, Any]],
    out_dir: str | Path,
    samples_per_shard: int = 1000,
    max_bytes: int = 1 << 30,
    prefix: str = "shard",
) -> list[Path]:
    """Writes all samples into a folder without shards, by a ShardWriter, and returns the shards.

    A sample is a mapping with `__key__`, `json` (an object) and its media as bytes (`0.jpg`).
    Raises ShardError for a folder that has shards, no samples, a bad key or a key used twice.
    """
    out = Path(out_dir)
    if any(out.glob("*.tar")):
        raise ShardError(f"{out} already holds shards: remove it or choose another folder")
    remove_partial(out)
    writer = ShardWriter(out, samples_per_shard, max_bytes, prefix)
    keys: set[str] = set()
    finished: list[Path | None] = []
    for sample in samples:
        finished.append(writer.write(sample))
        if sample["__key__"] in keys:
            raise ShardError(f"__key__: {sample['__key__']!r} is used twice")
        keys.add(sample["__key__"])
    if not keys:
        raise ShardError(f"{out}: there were no samples to write")
    finished.append(writer.finish())
    return [shard for shard in finished if shard is not None]


def remove_partial(folder: str | Path) -> None:
    """Removes what a killed writer left unfinished."""
    for leftover in Path(folder).glob(f"*.tar{PARTIAL_SUFFIX}"):
        leftover.unlink()


def _checked(sample: Mapping[str, Any]) -> dict[str, Any]:
    key = sample.get("__key__")
    if not isinstance(key, str) or not key or "." in key or key.startswith("__"):
        raise ShardError(f"__key__: {key!r}: must be a text without dots, not starting with __")
    members = dict(sample)
    if not isinstance(members.get("json"), bytes):
        members["json"] = json.dumps(members.get("json"), ensure_ascii=False).encode()
    return members


def shard_files(path: str | Path) -> list[Path]:
    """The finished shards of a folder by name; ShardError where there are none."""
    folder = Path(path)
    if folder.is_file():
        raise ShardError(f"{folder} is a file: give the folder that holds it")
    if not folder.is_dir():
        raise ShardError(f"{folder} does not exist: {_instead_of(folder)}")
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ShardError(f"{folder} holds no .tar shards: build them or correct the path")
    return shards


def _instead_of(folder: Path) -> str:
    """What to give for a folder that is not there."""
    if re.search(r"[*?\[{]", folder.name):
        return "give a folder, all of whose shards are read, and no pattern of names"
    return "build the shards or correct the path"


def read_samples(path: str | Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and undecoded members (`json`, `0.jpg`, ...) of each sample of a folder, in order."""
    shards = [str(shard) for shard in shard_files(path)]
    # All shards on whatever rank asks: webdataset would refuse to guess in a job of several.
    for raw in webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=lambda urls: urls):
        yield raw["__key__"], {n: data for n, data in raw.items() if not n.startswith("__")}


def check_source(path: str | Path) -> SourceInfo:
    """Checks, reading no shard, that a folder can be loaded; ShardError says what is wrong."""
    counts = training_shards(path)
    return SourceInfo(shards=len(counts), samples=sum(counts.values()))


def training_shards(path: str | Path) -> dict[str, int]:
    """The shards that a folder's index has for training, by name, with their numbers of samples;
    of a folder in an object store, too.

    All of them where the index is ours; `energon prepare` may leave some to other parts. Raises
    ShardError where the index is missing or does not match the folder.
    """
    folder = str(path).rstrip("/")
    names = _shard_names(folder)
    prepare = f"run `python -m data_pipeline.index {folder}`"
    if is_url(folder):
        prepare = "run `python -m data_pipeline.index FOLDER` on the folder before it is uploaded"
    info, split = (f"{folder}/{INDEX_FOLDER}/{name}" for name in (".info.json", "split.yaml"))
    mark, counted, parted = map(_text, (f"{folder}/{INDEX_FOLDER}/{INDEX_MARK}", info, split))
    if mark is None or counted is None or parted is None:
        raise ShardError(f"{folder} has no complete index: {prepare}")
    try:
        counts: dict[str, int] = json.loads(counted)["shard_counts"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{info} cannot be read ({error}): {prepare}") from None
    changed = sorted(names.symmetric_difference(counts))
    if changed:
        raise ShardError(f"{folder}: the index does not match the shards ({changed[0]}): {prepare}")
    try:
        chosen = _training_part(yaml.safe_load(parted))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{split} cannot be read ({error!r}): {prepare}") from None
    used = {name: counts[name] for name in sorted(counts) if name in chosen and counts[name]}
    if not used:
        raise ShardError(f"{split}: no sample is left for training: {prepare}")
    return used


def _shard_names(folder: str) -> set[str]:
    if not is_url(folder):
        return {shard.name for shard in shard_files(folder)}
    try:
        names = {name for name in stores.names(folder) if name.endswith(".tar")}
    except StoreError as error:
        raise ShardError(str(error)) from None
    if not names:
        raise ShardError(f"{folder} holds no .tar shards: upload them or correct the URL")
    return names


def _text(path: str) -> str | None:
    """A file of an index; None: it is not there."""
    try:
        if is_url(path):
            return stores.read(path).decode()
        return Path(path).read_text() if Path(path).is_file() else None
    except GoneError:
        return None
    except (StoreError, UnicodeDecodeError) as error:
        raise ShardError(f"{path} cannot be read: {error}") from None


def _training_part(split: dict[str, Any]) -> set[str]:
    """Names of shards: patterns such as `shard-{000000..000004}.tar` for the part `train`."""
    excluded = {name for pattern in split.get("exclude") or () for name in braceexpand(pattern)}
    single = sorted(name for name in excluded if not name.endswith(".tar"))
    if single:
        raise ShardError(f"exclude of {single[0]}: only whole shards can be left out: rebuild it")
    names = {name for pattern in split["split_parts"]["train"] for name in braceexpand(pattern)}
    return names - excluded

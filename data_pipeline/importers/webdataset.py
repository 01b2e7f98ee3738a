"""Reads WebDataset shards of others: a picture or video (`jpg`, `mp4`, ...) and `txt` or `json`."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from webdataset.tariterators import group_by_keys, tar_file_iterator

from data_pipeline import files
from data_pipeline.importers.captions import CAPTION_COLUMNS
from data_pipeline.importers.conversation import conversation_draft, looks_like_one
from data_pipeline.importers.draft import (
    Draft,
    Entry,
    Medium,
    caption_draft,
    distinct_stems,
    media_type,
    text_draft,
)
from data_pipeline.schema import SampleError, parse_sample

DAMAGE = (tarfile.TarError, EOFError, ValueError, OSError, zlib.error)


def shard_entries(paths: list[str]) -> Iterator[Entry]:
    """The samples of all shards; of a damaged one those before the damage."""
    stems = distinct_stems([files.name(path).partition(".")[0] for path in paths])
    for at, (path, stem) in enumerate(zip(paths, stems, strict=True)):
        number = -1
        share = (at + 1) / len(paths)
        try:
            for number, parts in enumerate(read_samples(path)):
                place = f"{files.name(path)}/{parts.pop('__key__')}"
                yield Entry(f"{stem}-{number:06d}", place, share, _draft_or_reason(parts))
        except DAMAGE as error:
            damage = SampleError("damaged_shard", f"after {number + 1} samples: {error}")
            yield Entry(f"{stem}-{number + 1:06d}", files.name(path), share, damage)


def read_samples(path: str) -> Iterator[dict[str, Any]]:
    """Members by suffix (`jpg`, `0.jpg`) and the `__key__` of each sample, in stored order.

    Raises one of DAMAGE where a shard is damaged, after all samples before the damage.
    """
    damage: list[Exception] = []

    def members() -> Iterator[dict[str, Any]]:
        try:
            with files.open_file(path) as file:
                watched = _Watched(file)
                for member in tar_file_iterator(watched):
                    yield {**member, "__url__": path}
                watched.check_end(files.suffix(path) == ".tar")
        except DAMAGE as error:
            damage.append(error)  # after the sample that was complete before it

    for sample in group_by_keys(members(), lcase=True):
        yield {k: v for k, v in sample.items() if k == "__key__" or not k.startswith("__")}
    if damage:
        raise damage[0]


class _Watched:
    """A file that remembers its last bytes: tarfile takes a header that is cut off for the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._tail = file, b""

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._tail = (self._tail + data)[-512:]
        return data

    def check_end(self, plain: bool) -> None:
        """An archive that is not compressed ends with zeros."""
        if plain and any(self._tail):
            raise tarfile.ReadError("the end of the archive is missing")


def _draft_or_reason(parts: dict[str, Any]) -> Draft | SampleError:
    try:
        return shard_draft(parts)
    except SampleError as error:
        return error


def shard_draft(parts: dict[str, bytes]) -> Draft:
    """A sample of a shard -> a draft; SampleError where it has no caption or no medium."""
    record = _json(parts)
    media = {name: kind for name in sorted(parts) if (kind := media_type(f"m.{name}"))}
    if looks_like_one(record):
        return _conversation(record, parts)
    caption = _caption(parts, record)
    if not caption.strip():
        raise SampleError("missing_caption", f"members: {', '.join(sorted(parts))}")
    if not media:
        return text_draft(caption)
    if len(media) > 1:
        raise SampleError("ambiguous_media", f"one caption, {len(media)} media: {', '.join(media)}")
    ((name, kind),) = media.items()
    return caption_draft(Medium(kind, parts[name], files.suffix(f"m.{name}")), caption.strip())


def _json(parts: dict[str, bytes]) -> dict[str, Any]:
    if "json" not in parts:
        return {}
    try:
        record = json.loads(parts["json"])
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", str(error)) from None
    return record if isinstance(record, dict) else {}


def _caption(parts: dict[str, bytes], record: dict[str, Any]) -> str:
    for name in ("txt", "text", "caption"):
        if name in parts:
            return parts[name].decode(errors="replace")
    return next((record[c] for c in CAPTION_COLUMNS if isinstance(record.get(c), str)), "")


def _conversation(record: dict[str, Any], parts: dict[str, bytes]) -> Draft:
    """Our own form, or a conversation whose media are members of the shard."""
    if "media" not in record:
        known = record | {
            column: [_member(parts, name) for name in record.get(column) or []]
            for column in ("images", "videos")
        }
        return conversation_draft(known, "")
    sample = parse_sample("", record)
    media = [
        Medium(m.type, _member(parts, m.file)["bytes"], files.suffix(m.file), m.times)
        for m in sample.media
    ]
    return Draft([vars(message) for message in sample.messages], media, sample.kind)


def _member(parts: dict[str, bytes], name: str) -> dict[str, Any]:
    if name not in parts:
        raise SampleError("missing_file", f"{name} is not in the shard")
    return {"bytes": parts[name], "path": f"m.{name}"}

"""A JSON object that has the records of a set by their ids.

Ego4D's `{"videos": {id: {...}}}` and VideoLLM-online's `{id: {...}}`, whose entries may be lists of
narrations. Large ones are read entry by entry, so that an import takes no more memory for them.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

import ijson

from data_pipeline import files
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError

# Fields of a record, none of which is an id.
_FIELDS = frozenset({
    "messages", "conversations", "conversation", "question", "response", "segments", "words",
    "images", "videos", "narrations", "content", "subtitles", "transcription", "chunks",
    "word_segments", "text_stream",
})  # fmt: skip
_TIMES = frozenset({"time", "timestamp_sec"})  # one of which a narration has
_VIDEOS = "videos"
_LOOKED_AT = 1000  # first entries of a large object that say what it is


def records_by_id(value: dict[str, Any], path: str) -> Iterator[dict[str, Any]]:
    """The records of an object in a file, or the object where it is one itself. Raises ShardError
    for lists of other records than narrations."""
    inner = value[_VIDEOS] if isinstance(value.get(_VIDEOS), dict) else value
    if not inner or _FIELDS & set(inner) or not all(
        isinstance(entry, dict | list) for entry in inner.values()
    ):  # fmt: skip
        yield value
        return
    for name, entry in inner.items():
        yield _record(name, entry, path)


def _record(name: str, entry: dict[str, Any] | list[Any], path: str) -> dict[str, Any]:
    fields = entry if isinstance(entry, dict) else {"narrations": entry}
    first = entry[0] if isinstance(entry, list) and entry else None
    if isinstance(first, dict) and _TIMES.isdisjoint(first):
        raise ShardError(
            f"{path}: {name} holds a list of records, which is read alone: take it out "
            f"(jq '.[\"{name}\"]' FILE > {name}.json)"
        )
    return {"video_uid": name} | fields


def place_of_records(path: str) -> str | None:
    """Where in a large object ijson finds the records: `videos`, or "", the top of it; None: it is
    one record, or nothing can be read of it.
    """
    with _opened(path) as file:
        top = list(islice(_kinds(file, ""), _LOOKED_AT))
    inside, kinds = "", dict(top)
    if kinds.get(_VIDEOS) == "start_map":
        inside = _VIDEOS
        with _opened(path) as file:
            kinds = dict(islice(_kinds(file, inside), _LOOKED_AT))
    if not kinds or _FIELDS & kinds.keys() or set(kinds.values()) - {"start_map", "start_array"}:
        return None
    return inside


def by_ids(path: str, inside: str, size: int) -> Iterator[tuple[Any, float]]:
    """The records that lie `inside`, each with the share of the file's `size` bytes read so far.

    What is neither an object nor a list among them is a SampleError, and so is damage, which ends
    them. Raises ShardError for damage before the first, and as `records_by_id`.
    """
    found = 0
    with _opened(path) as file:
        try:
            for name, entry in ijson.kvitems(file, inside, use_float=True):
                found += 1
                share = min(1.0, file.tell() / size) if size else 0.0
                if isinstance(entry, dict | list):
                    yield _record(name, entry, path), share
                else:
                    yield SampleError("bad_schema", f"{name}: {entry!r:.80} is no object"), share
        except ijson.JSONError as error:
            damage = SampleError("bad_json", f"after {found} records: {_line(error)}")
            if not found:
                raise ShardError(f"{path} cannot be read: {damage.detail}") from None
            yield damage, 1.0


def _kinds(file: BinaryIO, inside: str) -> Iterator[tuple[str, str]]:
    """Of each entry of an object its name, and the event that its value begins with; nothing after
    the one called `videos`."""
    name: str | None = None
    try:
        for prefix, event, value in ijson.parse(file):
            if name is not None:
                yield name, event
                if not inside and name == _VIDEOS:
                    return
                name = None
            elif prefix == inside and event == "map_key":
                name = value
            elif prefix == inside == _VIDEOS and event == "end_map":
                return
    except ijson.JSONError:  # said when the records before the damage have been read
        return


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    with files.open_records(path) as (file, _):
        if file.peek(3)[:3] == codecs.BOM_UTF8:  # type: ignore[attr-defined]
            file.read(3)
        yield file


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

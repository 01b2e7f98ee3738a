"""A JSON object that has the records of a set by their ids.

Ego4D's `{"videos": {id: {...}}}`, YouCook2's under `database`, and `{id: {...}}` of ActivityNet
Captions and VideoLLM-online, whose entries may be lists of narrations. Large ones are read entry by
entry, so that an import takes no more memory for them.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

import ijson

from data_pipeline import files
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError

# Fields of a record, none of which is an id.
FIELDS = frozenset({
    "messages", "conversations", "conversation", "question", "response", "segments", "words",
    "images", "videos", "narrations", "content", "subtitles", "transcription", "chunks",
    "word_segments", "text_stream", "texts",
})  # fmt: skip
# One of which narrations have, or words and segments.
_TIMES = frozenset({"time", "timestamp_sec", "start", "timestamp", "offsets"})
_INSIDE = ("videos", "database")  # of Ego4D, YouCook2: where else an object has its records
_LOOKED_AT = 1000  # first entries of a large object that say what it is
_OF_LIST = 10  # first entries of a list that do


def records_by_id(value: dict[str, Any], path: str) -> Iterator[dict[str, Any] | SampleError]:
    """The records of an object in a file, or the object where it is one itself.

    A list of other records than narrations and words is a SampleError. Raises ShardError where it
    is the first list.
    """
    inside = next((name for name in _INSIDE if isinstance(value.get(name), dict)), "")
    inner = value[inside] if inside else value
    if not inner or FIELDS & set(inner) or not all(
        isinstance(entry, dict | list) for entry in inner.values()
    ):  # fmt: skip
        yield value
        return
    yield from _records(inner.items(), path, inside)


def _records(
    entries: Iterable[tuple[str, Any]], path: str, inside: str
) -> Iterator[dict[str, Any] | SampleError]:
    lists = 0  # that were of narrations or words
    for name, entry in entries:
        if isinstance(entry, dict):
            yield {"video_uid": name} | entry
        elif not isinstance(entry, list):
            yield SampleError("bad_schema", f"{name}: {entry!r:.80} is no object")
        elif _are_timed(entry):
            lists += 1
            yield {"video_uid": name, "narrations": entry}
        else:
            detail = list_alone(name, inside)
            if not lists:
                raise ShardError(f"{path}: {detail}")
            yield SampleError("bad_schema", detail)


def list_alone(name: str, inside: str = "") -> str:
    """What to do with a list of records under a name."""
    return (f"{name} holds a list of records, which is read alone: take it out "
            f"(jq '.{inside}[\"{name}\"]' FILE > {name}.json)")  # fmt: skip


def _are_timed(entries: list[Any]) -> bool:
    """Whether a list is one of narrations or words, and not of records."""
    first = entries[:_OF_LIST]
    return not first or any(not isinstance(e, dict) or not _TIMES.isdisjoint(e) for e in first)


def top_of(path: str) -> dict[str, str]:
    """The event of ijson with which each field of a large object begins."""
    with opened_json(path) as file:
        return dict(islice(_kinds(file, ""), _LOOKED_AT))


def place_of_records(path: str, kinds: dict[str, str]) -> str | None:
    """Where ijson finds the records in a large object with these fields: `videos`, or "", the top
    of it; None: it is one record, or nothing can be read of it."""
    inside = next((name for name in _INSIDE if kinds.get(name) == "start_map"), "")
    if inside:
        with opened_json(path) as file:
            kinds = dict(islice(_kinds(file, inside), _LOOKED_AT))
    if not kinds or FIELDS & kinds.keys() or set(kinds.values()) - {"start_map", "start_array"}:
        return None
    return inside


def by_ids(path: str, inside: str, size: int) -> Iterator[tuple[Any, float]]:
    """The records of a file below the place `inside`, each with the share of its `size` bytes read
    so far.

    What is neither an object nor a list of `records_by_id` among them is a SampleError. Ends as
    `until_damage`. Raises ShardError as that, and as `records_by_id`.
    """

    def read() -> Iterator[tuple[Any, float]]:
        with opened_json(path) as file:
            for record in _records(ijson.kvitems(file, inside, use_float=True), path, inside):
                yield record, min(1.0, file.tell() / size) if size else 0.0

    return until_damage(read(), path)


def until_damage(records: Iterator[tuple[Any, float]], path: str) -> Iterator[tuple[Any, float]]:
    """Records that ijson reads from a file, with the share of it read so far; damage ends them with
    a SampleError. Raises ShardError for damage before the first."""
    found = 0
    try:
        for record in records:
            found += 1
            yield record
    except ijson.JSONError as error:
        damage = SampleError("bad_json", f"after {found} records: {line(error)}")
        if not found:
            raise ShardError(f"{path} cannot be read: {damage.detail}") from None
        yield damage, 1.0


def _kinds(file: BinaryIO, inside: str) -> Iterator[tuple[str, str]]:
    """For each entry of an object its name, and the event that its value begins with; nothing after
    an object that has the records."""
    name: str | None = None
    try:
        for prefix, event, value in ijson.parse(file):
            if name is not None:
                yield name, event
                if not inside and name in _INSIDE and event == "start_map":
                    return
                name = None
            elif prefix == inside and event == "map_key":
                name = value
            elif inside and prefix == inside and event == "end_map":
                return
    except ijson.JSONError:  # said when the records before the damage have been read
        return


@contextmanager
def opened_json(path: str) -> Iterator[BinaryIO]:
    with files.open_records(path) as (file, _):
        if file.peek(3)[:3] == codecs.BOM_UTF8:  # type: ignore[attr-defined]
            file.read(3)
        yield file


def line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

"""The media of a record whose files are members of a shard, in place of their names.

A record names a member by its whole name (`dir/000.jpg`), the last part of it, or its suffix. One
that names none has the sample's own members.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data_pipeline import files
from data_pipeline.importers.draft import IMAGE_FIELDS, PATH_FIELDS, VIDEO_FIELDS, as_list
from data_pipeline.importers.streaming import CLIP_FIELDS
from data_pipeline.schema import MediaType, SampleError, member_named
from data_pipeline.strict_json import loads

_IDS = frozenset(CLIP_FIELDS) - frozenset(VIDEO_FIELDS)  # a clip's name or id, perhaps no file's
_OTHER_NAME = "the sample's only video, whose name is not the one that the record gives"


def in_number_order(name: str) -> list[Any]:
    """Sorts `2.jpg` before `10.jpg`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def fill(
    record: dict[str, Any],
    parts: dict[str, bytes],
    key: str,
    media: Mapping[str, MediaType],
    *,
    stream: bool,
) -> tuple[dict[str, Any], set[str], list[str]]:
    """A record with the bytes of its media, the members that it uses, and notes.

    Args:
        parts: the sample's members by the rest of their names; media: those that are media.
        stream: the record is a stream: the only video of its sample is its clip, whatever its name
            was where the record comes from, and ids may name it.
    """
    used: set[str] = set()
    notes: list[str] = []
    filled = dict(record)
    videos = [name for name in media if media[name] == "video"]
    alone = _bytes(parts, videos[0]) if stream and len(videos) == 1 else None
    for column in (*IMAGE_FIELDS, *VIDEO_FIELDS, *(sorted(_IDS) if stream else ())):
        value = _object(record.get(column)) if stream else record.get(column)
        if not value:
            continue
        found = []
        for one in as_list(value):
            try:
                own = member(parts, one, key)
            except SampleError:
                if column in _IDS:
                    found.append(one)
                    continue
                if alone is None or column in IMAGE_FIELDS:
                    raise
                own = alone
                notes += [_OTHER_NAME] if _name(one) else []
            used.add(own["name"])
            rest = one if isinstance(one, dict) else {}
            found.append(rest | {"bytes": own["bytes"], "path": own["path"]})
        filled[column] = found if isinstance(value, list) or not stream else found[0]
    if not used:  # the sample's members are what its record is about
        for column, kind in (("images", "image"), ("videos", "video")):
            if stream and videos and kind == "image":  # beside a clip: its cover
                continue
            names = [name for name in media if media[name] == kind]
            filled[column] = [{"bytes": parts[name], "path": f"m.{name}"} for name in names]
            used.update(names)
    return filled, used, notes


def member(parts: dict[str, bytes], name: Any, key: str) -> dict[str, Any]:
    """`{bytes, path, name}` of the member that a record names; SampleError where there is none."""
    if not isinstance(name, str | dict):
        raise SampleError("bad_schema", f"{name!r:.80} is not the name of a member")
    path = _name(name)
    if path is None:
        raise SampleError("bad_schema", f"{name!r:.80} is not the name of a member")
    stem = key.rpartition("/")[2]
    last = path.rpartition("/")[2]
    inside = last.removeprefix(f"{stem}.") if last.startswith(f"{stem}.") else last
    spelt = {files.composed(name): name for name in parts}
    for named in map(files.composed, (path, inside)):
        if found := member_named(named, spelt):
            return _bytes(parts, spelt[found])
    raise SampleError("missing_file", f"{path} is not in the shard")


def _name(value: Any) -> str | None:
    if isinstance(value, dict):
        value = next((value[name] for name in PATH_FIELDS if value.get(name)), None)
    return value if isinstance(value, str) else None


def _bytes(parts: dict[str, bytes], name: str) -> dict[str, Any]:
    return {"bytes": parts[name], "path": f"m.{name}", "name": name}


def _object(value: Any) -> Any:
    """Realtime-QA's `video` may be the JSON of an object."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return loads(value)
        except ValueError:  # told when the record is read
            return value
    return value

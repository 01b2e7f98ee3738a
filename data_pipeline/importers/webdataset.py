"""Reads WebDataset shards of others: a picture or video (`jpg`, `mp4`, ...) and `txt` or `json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data_pipeline import files
from data_pipeline.importers.archive import Archive, Members, open_archive
from data_pipeline.importers.captions import CAPTION_COLUMNS
from data_pipeline.importers.conversation import (
    IMAGE_FIELDS,
    VIDEO_FIELDS,
    conversation_draft,
    looks_like_one,
)
from data_pipeline.importers.draft import (
    Draft,
    Entry,
    Medium,
    caption_draft,
    distinct_stems,
    media_type,
    text_draft,
    unused_fields,
)
from data_pipeline.schema import SampleError, parse_sample

# Members that say something about a sample and are none of its media: left out, and counted.
_ABOUT = frozenset({
    "cls", "cls2", "id", "idx", "index", "inx", "ten", "tb", "npy", "npz", "pth", "pt", "pyd",
    "pickle", "pkl", "mp", "msg", "msgpack", "cbor", "yaml", "yml", "xml", "url", "md5", "sha1",
    "sha256", "html", "htm", "csv", "tsv", "jsonl", "srt", "vtt", "log", "meta", "metadata", "md",
})  # fmt: skip
_TEXTS = ("txt", "text", "caption")


def shard_entries(paths: list[str]) -> Iterator[Entry]:
    """The samples of all shards; a damaged shard is rejected from where its damage starts."""
    stems = distinct_stems([files.name(path).partition(".")[0] for path in paths])
    seen = _Media(paths)
    for at, (path, stem) in enumerate(zip(paths, stems, strict=True)):
        share = (at + 1) / len(paths)
        with open_archive(path) as archive:
            notes = tuple(archive.left_out.elements())
            with_media = seen.anywhere(archive)
            for number, members in enumerate(archive.samples):
                draft = _draft_or_reason(archive, members, with_media)
                if notes and isinstance(draft, Draft):
                    draft = _noted(draft, notes)
                    notes = ()
                place = f"{files.name(path)}/{members.key}"
                yield Entry(f"{stem}-{number:06d}", place, share, draft)
            if archive.damage is not None:
                count = len(archive.samples)
                damage = SampleError("damaged_shard", f"after {count} samples: {archive.damage}")
                yield Entry(f"{stem}-{count:06d}", files.name(path), share, damage)


def _noted(draft: Draft, notes: tuple[str, ...]) -> Draft:
    return replace(draft, notes=draft.notes + notes)


class _Media:
    """Whether any of a source's shards has a picture or video: then a text alone has lost its own.

    Shards on a server are looked at only when their turn comes.
    """

    def __init__(self, paths: list[str]) -> None:
        self._unseen = [path for path in paths if not files.is_url(path)]
        self._found = False

    def anywhere(self, archive: Archive) -> bool:
        self._found = self._found or _has_media(archive)
        while not self._found and self._unseen:
            with open_archive(self._unseen.pop()) as other:
                self._found = _has_media(other)
        return self._found


def _has_media(archive: Archive) -> bool:
    return any(media_type(f"m.{rest}") for members in archive.samples for rest in members.found)


def read_samples(path: str) -> Iterator[dict[str, Any]]:
    """Members by suffix (`jpg`, `0.jpg`) and the `__key__` of each sample, in stored order.

    `__error__` is there, a SampleError, in place of members that cannot be read. Raises one of
    DAMAGE where a shard is damaged, after all samples before the damage.
    """
    with open_archive(path) as archive:
        for members in archive.samples:
            try:
                yield {"__key__": members.key, **_read(archive, members)}
            except SampleError as error:
                yield {"__key__": members.key, "__error__": error}
        if archive.damage is not None:
            raise archive.damage


def _read(archive: Archive, members: Members) -> dict[str, bytes]:
    if members.repeated:
        raise SampleError(
            "repeated_member", f"{', '.join(members.repeated)}: more than once in the shard"
        )
    return {rest: archive.read(member) for rest, member in members.found.items()}


def _draft_or_reason(archive: Archive, members: Members, with_media: bool) -> Draft | SampleError:
    try:
        parts = _read(archive, members)
        draft = shard_draft(parts, members.key)
        if with_media and not draft.media and draft.kind == "caption":
            raise SampleError("missing_file", f"{members.key}: a caption alone, in shards of media")
        return draft
    except SampleError as error:
        return error
    except MemoryError:
        raise
    except Exception as error:  # whatever a strange member leads to: it costs its sample
        return SampleError("bad_schema", f"{members.key}: {type(error).__name__}: {error}")


def shard_draft(parts: dict[str, bytes], key: str) -> Draft:
    """A sample of a shard -> a draft; SampleError where it has no caption or no medium."""
    record = _json(parts)
    media = {name: kind for name in sorted(parts) if (kind := media_type(f"m.{name}"))}
    others = [name for name in sorted(parts) if name not in media and name != "json"]
    others = [name for name in others if name not in _TEXTS]
    strange = [name for name in others if name.rpartition(".")[2] not in _ABOUT]
    if strange and "media" not in record:
        raise SampleError("unknown_media", f"{key}.{strange[0]}: neither text, picture nor video")
    notes = [f"unused member .{name}" for name in others]
    if looks_like_one(record):
        return _conversation(record, parts, key, media, notes)
    caption, used = _caption(parts, record, key)
    notes += unused_fields(record, used)
    notes += [f"unused member .{name}" for name in _TEXTS if name in parts and name not in used]
    if not caption.strip():
        raise SampleError("missing_caption", f"members: {', '.join(sorted(parts))}")
    if not media:
        return text_draft(caption, tuple(notes))
    if len(media) > 1:
        raise SampleError("ambiguous_media", f"one caption, {len(media)} media: {', '.join(media)}")
    ((name, kind),) = media.items()
    shown = Medium(kind, parts[name], files.suffix(f"m.{name}"))
    return caption_draft(shown, caption.strip(), notes=tuple(notes))


def _json(parts: dict[str, bytes]) -> dict[str, Any]:
    if "json" not in parts:
        return {}
    try:
        record = json.loads(parts["json"])
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", str(error)) from None
    return record if isinstance(record, dict) else {}


def _caption(parts: dict[str, bytes], record: dict[str, Any], key: str) -> tuple[str, list[str]]:
    """The caption, and the member or field that it is."""
    for name in _TEXTS:
        if name in parts:
            return files.decode_text(parts[name], f"{key}.{name}"), [name]
    found = [column for column in CAPTION_COLUMNS if isinstance(record.get(column), str)]
    return (record[found[0]], found[:1]) if found else ("", [])


def _conversation(
    record: dict[str, Any],
    parts: dict[str, bytes],
    key: str,
    media: dict[str, Any],
    notes: list[str],
) -> Draft:
    """Our own form, or a conversation whose media are members of the shard."""
    if "media" in record:
        sample = parse_sample("", record)
        shown = [
            Medium(m.type, _member(parts, m.file, key)["bytes"], files.suffix(m.file), m.times)
            for m in sample.media
        ]
        turns = [
            {k: v for k, v in vars(message).items() if k != "learn" or not v}
            for message in sample.messages
        ]
        return Draft(turns, shown, sample.kind, notes=tuple(notes))
    used: set[str] = set()
    known = dict(record)
    for column in (*IMAGE_FIELDS, *VIDEO_FIELDS):
        if named := record.get(column):
            names = named if isinstance(named, list) else [named]
            found = [_member(parts, name, key) for name in names]
            known[column] = [{"bytes": one["bytes"], "path": one["path"]} for one in found]
            used.update(one["name"] for one in found)
    if not used:  # the sample's members are what its conversation is about
        for column, kind in (("image", "image"), ("video", "video")):
            names = [name for name in media if media[name] == kind]
            known[column] = [_member(parts, name, key) for name in names]
            used.update(names)
    left = [f"unused member .{name}" for name in media if name not in used]
    return _noted(conversation_draft(known, ""), tuple(notes + left))


def _member(parts: dict[str, bytes], name: Any, key: str) -> dict[str, Any]:
    """A medium by its member's whole name (`dir/000.jpg`), the last part of it, or its suffix."""
    if isinstance(name, dict):
        name = name.get("path")
    if not isinstance(name, str):
        raise SampleError("bad_schema", f"{name!r:.80} is not the name of a member")
    stem = key.rpartition("/")[2]
    last = name.rpartition("/")[2]
    inside = last.removeprefix(f"{stem}.").lower() if last.startswith(f"{stem}.") else last
    for found in (name, inside):
        if found in parts:
            return {"bytes": parts[found], "path": f"m.{found}", "name": found}
    raise SampleError("missing_file", f"{name} is not in the shard")

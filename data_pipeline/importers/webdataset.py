"""Reads WebDataset shards of others: a picture or video (`jpg`, `mp4`, ...) and `txt` or `json`.

A `json` may be a conversation, or a record of a real-time data set whose clip is a member beside
it (members.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

from data_pipeline import files
from data_pipeline.importers.archive import Archive, Members, open_archive
from data_pipeline.importers.captions import (
    CAPTION_COLUMNS,
    are_captions,
    caption_drafts,
    captions_of,
)
from data_pipeline.importers.conversation import (
    conversation_draft,
    looks_like_one,
    messages_field,
)
from data_pipeline.importers.draft import (
    Convert,
    Draft,
    Entry,
    Medium,
    as_list,
    distinct_stems,
    media_type,
    text_draft,
    unused_fields,
)
from data_pipeline.importers.members import fill, in_number_order, member
from data_pipeline.importers.pairs import draft_of, looks_like_pair, pair_draft
from data_pipeline.importers.parts import plain_contents
from data_pipeline.importers.published import looks_like_vqa, vqa_draft
from data_pipeline.importers.recognize import ALIKE, form_of, form_of_all
from data_pipeline.importers.share import WHOLE, Share
from data_pipeline.importers.streaming import names_clip
from data_pipeline.importers.unwanted import refuse_unwanted
from data_pipeline.schema import SampleError, parse_sample
from data_pipeline.strict_json import loads

# Members that say something about a sample and are none of its media: left out, and counted.
_ABOUT = frozenset({
    "cls", "cls2", "id", "idx", "index", "inx", "ten", "tb", "npy", "npz", "pth", "pt", "pyd",
    "pickle", "pkl", "mp", "msg", "msgpack", "cbor", "yaml", "yml", "xml", "url", "md5", "sha1",
    "sha256", "html", "htm", "csv", "tsv", "jsonl", "srt", "vtt", "log", "meta", "metadata", "md",
})  # fmt: skip
_SOUNDS = frozenset({"m4a", "mp3", "wav", "flac", "aac", "ogg", "opus"})  # of video2dataset
_TEXTS = ("txt", "text", "caption")
# Records of these show their media second by second; the others are conversations or captions.
_STREAMS = frozenset({
    "realtime-qa", "moss-vl", "streamo-stream", "streamo", "joyai", "livechat", "narrations",
    "speech", "moments",
})  # fmt: skip
_FORM_SAMPLE = 100  # records of a shard by which forms that look alike are told apart


def shard_entries(
    paths: list[str], converts: dict[str, Convert], named: str | None = None, share: Share = WHOLE
) -> Iterator[Entry]:
    """The samples of all shards; a damaged shard is rejected from where its damage starts.

    Args:
        converts: what makes drafts of a record, by its form.
        named: the form of all records, where a user names one.
        share: whose shards are read.
    """
    stems = distinct_stems([files.name(path).partition(".")[0] for path in paths])
    seen = _Media(paths)
    for at, (path, stem) in enumerate(zip(paths, stems, strict=True)):
        if not share.has(stem):
            continue
        read = (at + 1) / len(paths)
        with open_archive(path) as archive:
            with_media, forms = seen.anywhere(archive), _Forms(archive, converts, named)
            for number, part, members, draft in _archive_drafts(archive, forms, with_media):
                key = f"{stem}-{number:06d}" + (f"-{part}" if part else "")
                yield Entry(key, f"{files.name(path)}/{members.key}", read, draft)
            if archive.damage is not None:
                count = len(archive.samples)
                damage = SampleError("damaged_shard", f"after {count} samples: {archive.damage}")
                yield Entry(f"{stem}-{count:06d}", files.name(path), read, damage)


class _Forms:
    """Which records of a shard are streams, and what makes drafts of them."""

    def __init__(
        self, archive: Archive, converts: dict[str, Convert], named: str | None = None
    ) -> None:
        self._archive, self._converts, self._named = archive, converts, named

    def stream(self, record: dict[str, Any], media: Mapping[str, str]) -> Convert | None:
        """What converts a record, with the kinds of its sample's media; None: it is no stream."""
        if "video" in media.values() and not names_clip(record):
            record = record | {"video": True}  # the clip is beside it
        form = self._named or form_of(record)
        if form in ALIKE and self._named is None:
            form = self._form or form
        return self._converts[form] if form in _STREAMS else None

    @cached_property
    def _form(self) -> str | None:
        """The form of the records that look alike, by the first ones of the shard."""
        members = (sample.found.get("json") for sample in self._archive.samples)
        texts = (self._archive.read(one) for one in members if one is not None)
        records = []
        for text in islice(texts, _FORM_SAMPLE):
            try:
                record = loads(text)
            except (ValueError, RecursionError):  # rejected when its turn comes
                continue
            records += [record] if isinstance(record, dict) and form_of(record) in ALIKE else []
        return form_of_all(records)


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


def _archive_drafts(
    archive: Archive, forms: _Forms, with_media: bool
) -> Iterator[tuple[int, int, Members, Draft | SampleError]]:
    """(Number of the sample, number of the draft in it, the sample, the draft); the first draft has
    the notes about the archive."""
    notes = tuple(archive.left_out.elements())
    for number, members in enumerate(archive.samples):
        for part, draft in enumerate(_drafts(archive, members, forms, with_media)):
            if notes and isinstance(draft, Draft):
                draft, notes = _noted(draft, notes), ()
            yield number, part, members, draft


def _noted(draft: Draft, notes: tuple[str, ...]) -> Draft:
    return replace(draft, notes=draft.notes + notes)


def _drafts(
    archive: Archive, members: Members, forms: _Forms, with_media: bool
) -> list[Draft | SampleError]:
    try:
        drafts = shard_drafts(_read(archive, members), members.key, forms)
        alone = with_media and not drafts[0].media and drafts[0].kind == "caption"
        if alone:
            raise SampleError("missing_file", f"{members.key}: a caption alone, in shards of media")
        return [*drafts]
    except SampleError as error:
        return [error]
    except MemoryError:
        raise
    except Exception as error:  # whatever a strange member leads to: it costs its sample
        return [SampleError("bad_schema", f"{members.key}: {type(error).__name__}: {error}")]


def shard_drafts(parts: dict[str, bytes], key: str, forms: _Forms) -> list[Draft]:
    """A sample of a shard -> drafts; SampleError where it has no caption or no medium."""
    found = _json(parts)
    record = found or {}
    media = {n: kind for n in sorted(parts, key=in_number_order) if (kind := media_type(f"m.{n}"))}
    others = [name for name in sorted(parts) if name not in media and name != "json"]
    others = [name for name in others if name not in _TEXTS]
    about = _ABOUT | _SOUNDS if "video" in media.values() else _ABOUT
    strange = [name for name in others if name.rpartition(".")[2] not in about]
    if strange and "media" not in record:
        raise SampleError("unknown_media", f"{key}.{strange[0]}: neither text, picture nor video")
    left_out = others if found is not None else [*others, "json"]
    notes = [f"unused member .{name}" for name in left_out]
    if "media" in record and looks_like_one(record):
        return [_own(record, parts, key, notes)]
    stream = forms.stream(record, media)
    captioned = any(name in parts for name in _TEXTS)
    is_question = bool(media) and not captioned and looks_like_vqa(record | {"image": True})
    turns = looks_like_one(record)
    captioned = captioned or any(record.get(name) for name in CAPTION_COLUMNS)
    pair = pair_draft if not captioned and looks_like_pair(record) else None
    own = draft_of(record) or (vqa_draft if is_question else pair)
    made = stream or (None if turns else own)
    answers = made is not None or turns
    refuse_unwanted(record, plain=not answers)
    if answers:
        if made is None:
            record = plain_contents(record, messages_field(record))
        filled, used, more = fill(record, parts, key, media, stream=stream is not None)
        unused = [name for name in parts if name in _TEXTS or (name in media and name not in used)]
        notes += [*more, *(f"unused member .{name}" for name in unused)]
        first, *rest = as_list((made or conversation_draft)(filled, ""))
        return [_noted(first, tuple(notes)), *rest]
    return _captioned(record, parts, key, media, notes)


def _captioned(
    record: dict[str, Any],
    parts: dict[str, bytes],
    key: str,
    media: dict[str, Any],
    notes: list[str],
) -> list[Draft]:
    texts, used = _captions(parts, record, key, notes)
    notes += unused_fields(record, used)
    notes += [f"unused member .{name}" for name in _TEXTS if name in parts and name not in used]
    if not texts:
        raise SampleError("missing_caption", f"members: {', '.join(sorted(parts))}")
    if not media:
        first, *others = texts
        return [text_draft(first, tuple(notes)), *map(text_draft, others)]
    if len(media) > 1:
        raise SampleError("ambiguous_media", f"one caption, {len(media)} media: {', '.join(media)}")
    ((name, kind),) = media.items()
    medium = Medium(kind, parts[name], files.suffix(f"m.{name}"))
    return caption_drafts([medium] * len(texts), texts, notes)


def _json(parts: dict[str, bytes]) -> dict[str, Any] | None:
    """The record of a sample; None: its `json` is neither an object nor a list of turns (boxes, a
    number), and a text has the caption."""
    if "json" not in parts:
        return {}
    try:
        record = loads(parts["json"])
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", str(error)) from None
    if isinstance(record, dict):
        return record
    if isinstance(record, list) and any(map(_is_turn, record)):
        return {"conversations": record}
    if any(name in parts for name in _TEXTS):
        return None
    raise SampleError("bad_schema", f"json: {record!r:.80}: expected an object, or a list of turns")


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or {"from", "value"} <= set(value))


def _captions(
    parts: dict[str, bytes], record: dict[str, Any], key: str, notes: list[str]
) -> tuple[list[str], list[str]]:
    """The captions, and the member or field that has them."""
    for name in _TEXTS:
        if name in parts:
            text = files.decode_text(parts[name], f"{key}.{name}")
            return [text] if text.strip() else [], [name]
    for name in CAPTION_COLUMNS:
        value = record.get(name)
        if value and (isinstance(value, str) or are_captions(value)):
            texts, left_out = captions_of(value)
            notes += left_out
            return texts, [name]
    return [], []


def _own(record: dict[str, Any], parts: dict[str, bytes], key: str, notes: list[str]) -> Draft:
    """A sample in our own form."""
    sample = parse_sample("", record)
    media = [
        Medium(m.type, member(parts, m.file, key)["bytes"], files.suffix(m.file), m.times)
        for m in sample.media
    ]
    turns = [
        {k: v for k, v in vars(message).items() if k != "learn" or not v}
        for message in sample.messages
    ]
    return Draft(turns, media, sample.kind, notes=tuple(notes))

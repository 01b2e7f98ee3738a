"""Records with a list of messages, in ShareGPT's, OpenAI's or LLaMA-Factory's form, to drafts.

What a record may hold is known here: `Dialect` for its fields, `_MESSAGE_FIELDS` for those of a
message. Another field that holds something is counted (`Draft.notes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from data_pipeline import files
from data_pipeline.importers.draft import (
    IMAGE_FIELDS,
    MEDIUM_FIELDS,
    ROLES,
    VIDEO_FIELDS,
    Draft,
    Medium,
    Turn,
    as_list,
    frames_as_pictures,
    in_order,
    media_type,
    medium,
    medium_name,
    names_medium,
    role_of,
    unused_fields,
)
from data_pipeline.importers.marks import ANY_MARKS, is_numbered, number_of, place_marks
from data_pipeline.importers.parts import plain_contents
from data_pipeline.importers.realtime import is_realtime, realtime_draft
from data_pipeline.importers.spans import VIDEO_SPAN, seconds_of
from data_pipeline.importers.unwanted import LEARN_FLAGS, refuse_unread_media
from data_pipeline.schema import IMAGE_MARK, MARK, VIDEO_MARK, MediaType, Role, SampleError
from data_pipeline.tool_texts import as_json, call_line, with_calls

_CALLS = ("tool_calls", "function_call")
_MESSAGE_FIELDS = frozenset({"name", "tool_call_id", *LEARN_FLAGS, *_CALLS})
_SOUND = ("audio", "audios")
_FILE_NAMES = ("file_name", "file_names")
# Of ms-swift: each stands for the next value of the record's `objects`.
_OBJECT_MARKS = ("<bbox>", "<ref-object>")


@dataclass(frozen=True)
class Dialect:
    """The names under which a record keeps its parts; None or (): it has no such part."""

    messages: str = "messages"
    role: str | None = None  # None: `role` or `from`, whichever the messages have
    content: str | None = None  # None: `content` or `value`
    roles: Mapping[str, Role] | None = None  # None: ROLES, in any letter case
    system: str | None = "system"
    tools: tuple[str, ...] = ("tools", "functions")
    images: tuple[str, ...] = IMAGE_FIELDS
    videos: tuple[str, ...] = VIDEO_FIELDS
    others: tuple[str, ...] = ()  # that are read elsewhere
    # Media without any mark stand before the first question, under whatever name.
    media_first: bool = False

    @cached_property
    def known(self) -> frozenset[str]:
        """All fields of a record that are used."""
        columns = (*self.tools, *self.images, *self.videos, *self.others)
        return frozenset((self.messages, self.system or "", *columns))


_DIALECTS = {name: Dialect(messages=name) for name in ("messages", "conversations")}


def conversation_draft(record: dict[str, Any], base: str, dialect: Dialect | None = None) -> Draft:
    """A record -> a draft; media paths are relative to `base`. Raises SampleError."""
    named = dialect is not None
    dialect = dialect or _DIALECTS[messages_field(record)]
    record = plain_contents(record, dialect.messages)
    messages = message_turns(record, dialect)
    record = record if named else _with_file_names(record, messages, dialect)
    longer = [entry for entry in record[dialect.messages] if len(entry) > 2]
    notes = [note for entry in longer for note in _message_notes(entry, dialect)]
    return with_media(messages, record, base, dialect, notes)


def _with_file_names(
    record: dict[str, Any], messages: list[Turn], dialect: Dialect
) -> dict[str, Any]:
    """The record with the media of `file_name`, as folders of Hugging Face's have it, under
    `images` and `videos`, where its questions have marks for them and it names no others."""
    field = next((name for name in _FILE_NAMES if record.get(name)), None)
    columns = (*dialect.images, *dialect.videos)
    if field is None or any(names_medium(record.get(name)) for name in columns):
        return record
    names = as_list(record[field])
    kinds = {media_type(name) if isinstance(name, str) else None for name in names}
    questions = [turn["content"] for turn in messages if turn["role"] != "assistant"]
    if None in kinds or not any(mark in text for mark in ANY_MARKS for text in questions):
        return record
    found = {kind: [name for name in names if media_type(name) == kind] for kind in kinds}
    media = {f"{kind}s": named for kind, named in found.items()}
    return {name: value for name, value in record.items() if name != field} | media


def message_turns(record: dict[str, Any], dialect: Dialect) -> list[Turn]:
    """The system's turn and those of the messages; SampleError."""
    entries = record.get(dialect.messages)
    if not isinstance(entries, list):
        if entries is not None or dialect.messages in record:
            detail = f"{dialect.messages}: {entries!r:.80} is not a list of messages"
            raise SampleError("bad_schema", detail)
        raise SampleError("bad_schema", f"a record must be an object with a list `messages`: "
                          f"its keys are {', '.join(map(str, record))}")  # fmt: skip
    messages = [_message(entry, i, dialect) for i, entry in enumerate(entries)]
    return system_turn(record, dialect) + messages


def with_media(
    messages: list[Turn],
    record: dict[str, Any],
    base: str,
    dialect: Dialect,
    notes: list[str] | None = None,
) -> Draft:
    """Gives a conversation the media that its record names, and notes what else is there."""
    for name in _SOUND:
        if record.get(name):
            raise SampleError("unknown_media", f"{name}: the model takes images and videos")
    for mark in _OBJECT_MARKS if record.get("objects") else ():
        if any(mark in message["content"] for message in messages):
            raise SampleError("bad_schema", f"objects: {mark} in a text stands for a value of it, "
                              "which is not put in: write the values into the texts")  # fmt: skip
    (images, image_field), (videos, video_field) = (
        _media(record, columns) for columns in (dialect.images, dialect.videos)
    )
    if not images and not videos:
        questions = [turn["content"] for turn in messages if turn["role"] != "assistant"]
        marked = any(mark in text for mark in ANY_MARKS for text in questions)
        mend = (
            "call it images or videos, or give --media-column"
            if dialect.images == IMAGE_FIELDS
            else "name it in `columns` of dataset_info.json"
        )
        refuse_unread_media(record, dialect.known, marked, mend)
    notes = (notes or []) + unused_fields(record, dialect.known)
    named: dict[MediaType, list[Any]] = {"image": images, "video": videos}
    single = not {"image", "video"}.isdisjoint((image_field, video_field))
    unmarked = single or dialect.media_first
    messages = place_marks(messages, named, notes, unmarked=unmarked)
    images, videos = named.values()
    if unmarked and not any(MARK.search(message["content"]) for message in messages):
        marks = IMAGE_MARK * len(images) + VIDEO_MARK * len(videos)
        messages = _marked(messages, marks if dialect.media_first else f"{marks}\n")
        if not dialect.media_first:
            notes.append("medium without a mark, put before the first user's turn")
    pictures = [medium("image", image, base) for image in images]
    if is_realtime(videos):
        draft = realtime_draft(messages, pictures, videos, base)
        return replace(draft, notes=(*notes, *draft.notes))
    used = {"images": MEDIUM_FIELDS, "videos": MEDIUM_FIELDS.union(VIDEO_SPAN)}
    for column, values in (("images", images), ("videos", videos)):
        for value in values:
            if isinstance(value, dict):
                notes += unused_fields(value, used[column], f"{column}[].")
    marks = sum(message["content"].count(VIDEO_MARK) for message in messages)
    if marks == 1 < len(videos) and all(map(_is_still, videos)):
        raise frames_as_pictures(videos)
    media: dict[MediaType, list[Any]] = {
        "image": pictures,
        "video": [_clip(video, base) for video in videos],
    }
    return Draft(messages, in_order(messages, media), notes=tuple(notes))


def _is_still(video: Any) -> bool:
    name = medium_name(video) or ""
    return media_type(name) == "image" and files.suffix(name) not in files.ANIMATED_SUFFIXES


def _clip(video: Any, base: str) -> Medium:
    """A video, or the part of it that its `video_start` and `video_end` say; SampleError."""
    clip = medium("video", video, base)
    times = [video.get(name) for name in VIDEO_SPAN] if isinstance(video, dict) else [None, None]
    return clip if times == [None, None] else replace(clip, part=seconds_of(times, VIDEO_SPAN))


def _message(entry: Any, index: int, dialect: Dialect) -> Turn:
    if not isinstance(entry, dict):
        raise SampleError("bad_schema", f"messages[{index}]: {entry!r:.80} is not an object")
    role_key, content_key = _keys(entry, dialect)
    name, content = entry.get(role_key), entry.get(content_key)
    role = role_of(name) if dialect.roles is None else dialect.roles.get(str(name))
    if role_key == "role" and "name" in entry and str(name).lower() == "function":
        role = "user"  # OpenAI's: the answer of the function of that name
    if role is None:
        allowed = ", ".join(dialect.roles or ROLES)
        raise SampleError("bad_schema", f"messages[{index}].{role_key}: {name!r}: not of {allowed}")
    # Most messages have a role and a content alone.
    more = len(entry) > 2 or content is None
    calls = _calls(entry, index) if more else []
    if calls and role != "assistant":
        raise SampleError("bad_schema", f"messages[{index}]: a call of a tool by the {role}")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        hint = f", and it has {', '.join(_CALLS)}" if any(map(entry.get, _CALLS)) else ""
        raise SampleError(
            "bad_schema", f"messages[{index}].{content_key}: {content!r:.80} is not a text{hint}"
        )
    if calls:
        content = with_calls(content, calls)
    turn: Turn = {"role": role, "content": content}
    if more and role == "assistant" and not _learned(entry, index):
        turn["learn"] = False
    return turn


def _keys(entry: dict[str, Any], dialect: Dialect) -> tuple[str, str]:
    return (
        dialect.role or ("role" if "role" in entry else "from"),
        dialect.content or ("content" if "content" in entry else "value"),
    )


def _message_notes(entry: dict[str, Any], dialect: Dialect) -> list[str]:
    return unused_fields(entry, {*_keys(entry, dialect), *_MESSAGE_FIELDS}, "messages[].")


def _learned(entry: dict[str, Any], index: int) -> bool:
    flags = {name: entry[name] for name in LEARN_FLAGS if entry.get(name) is not None}
    for name, value in flags.items():
        if value not in (0, 1):  # False and 0.0 are 0, too
            raise SampleError(
                "bad_schema", f"messages[{index}].{name}: {value!r:.40}: only 0 and 1 are known"
            )
    return all(flags.values())


def _calls(entry: dict[str, Any], index: int) -> list[str]:
    """Each call as a JSON object with `name` and `arguments`, as in LLaMA-Factory's data."""
    calls = entry.get("tool_calls") or []
    calls = [*calls, entry["function_call"]] if entry.get("function_call") else calls
    texts = []
    for call in calls if isinstance(calls, list) else [None]:
        made = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(made, dict) or not isinstance(made.get("name"), str):
            raise SampleError(
                "bad_schema", f"messages[{index}]: {call!r:.80} is not a call of a tool"
            )
        texts.append(call_line(made["name"], made.get("arguments", {})))
    return texts


def system_turn(record: dict[str, Any], dialect: Dialect) -> list[Turn]:
    """The system message that a record has beside its messages, with its tools' descriptions."""
    system = record.get(dialect.system) if dialect.system else None
    if system is not None and not isinstance(system, str):
        raise SampleError("bad_schema", f"{dialect.system}: {system!r:.80} is not a text")
    tools = [record[name] for name in dialect.tools if record.get(name)]
    texts = [tool if isinstance(tool, str) else as_json(tool) for tool in tools]
    text = "\n\n".join(filter(None, [system, *texts]))
    return [{"role": "system", "content": text}] if text else []


def _media(record: dict[str, Any], columns: tuple[str, ...]) -> tuple[list[Any], str]:
    """What a record names, and the field that does."""
    full = [column for column in columns if names_medium(record.get(column))]
    if not full:
        return [], ""
    if len(full) > 1:
        raise SampleError("ambiguous_media", f"{' and '.join(full)} both name media: keep one")
    value = record[full[0]]
    if isinstance(value, dict) and value and all(map(is_numbered, value)):
        return [value[name] for name in sorted(value, key=number_of)], full[0]
    if isinstance(value, str | dict | bytes):
        value = [value]
    if not isinstance(value, list):
        raise SampleError("bad_schema", f"{full[0]}: {value!r:.80}: expected a list of file names")
    return [*value], full[0]


def _marked(messages: list[Turn], marks: str) -> list[Turn]:
    for i, message in enumerate(messages):
        if message["role"] == "user":
            first = message | {"content": marks + message["content"]}
            return [*messages[:i], first, *messages[i + 1 :]]
    return messages


def messages_field(record: dict[str, Any]) -> str:
    return "messages" if "messages" in record else "conversations"


def looks_like_one(record: dict[str, Any]) -> bool:
    return "messages" in record or "conversations" in record

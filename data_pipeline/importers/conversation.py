"""Records with a list of messages, in ShareGPT's, OpenAI's or LLaMA-Factory's form, to drafts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.importers.draft import Draft, in_order, medium
from data_pipeline.importers.realtime import is_realtime, realtime_draft
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, MediaType, Role, SampleError

# A tool's answer is the user's turn; its call is the model's.
ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "observation": "user",
    "tool": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "function": "assistant",
}


@dataclass(frozen=True)
class Dialect:
    """The names under which a record keeps its parts; None: it has no such part."""

    messages: str = "messages"
    role: str | None = None  # None: `role` or `from`, whichever the messages have
    content: str | None = None  # None: `content` or `value`
    roles: Mapping[str, Role] = field(default_factory=lambda: ROLES)
    system: str | None = "system"
    tools: str | None = "tools"
    images: str | None = "images"
    videos: str | None = "videos"


def conversation_draft(record: dict[str, Any], base: str, dialect: Dialect | None = None) -> Draft:
    """A record -> a draft; media paths are relative to `base`. Raises SampleError."""
    if dialect is None:
        dialect = Dialect(messages="messages" if "messages" in record else "conversations")
    entries = record.get(dialect.messages)
    if not isinstance(entries, list):
        raise SampleError("bad_schema", f"a record must be an object with a list `messages`: "
                          f"its keys are {', '.join(map(str, record))}")  # fmt: skip
    messages = [_message(entry, i, dialect) for i, entry in enumerate(entries)]
    return with_media(_system(record, dialect) + messages, record, base, dialect)


def with_media(
    messages: list[dict[str, str]], record: dict[str, Any], base: str, dialect: Dialect
) -> Draft:
    """Gives a conversation the media that its record names."""
    images, videos = _media(record, dialect.images), _media(record, dialect.videos)
    messages = [
        message | {"content": _our_marks(message["content"], bool(images or videos))}
        for message in messages
    ]
    pictures = [medium("image", image, base) for image in images]
    if is_realtime(videos):
        return realtime_draft(messages, pictures, videos, base)
    given: dict[MediaType, list[Any]] = {
        "image": pictures,
        "video": [medium("video", video, base) for video in videos],
    }
    return Draft(messages, in_order(messages, given))


def _message(entry: Any, index: int, dialect: Dialect) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise SampleError("bad_schema", f"messages[{index}]: {entry!r:.80} is not an object")
    role_key = dialect.role or ("role" if "role" in entry else "from")
    content_key = dialect.content or ("content" if "content" in entry else "value")
    name, content = entry.get(role_key), entry.get(content_key)
    role = dialect.roles.get(name) if isinstance(name, str) else None
    if role is None:
        allowed = ", ".join(dialect.roles)
        raise SampleError("bad_schema", f"messages[{index}].{role_key}: {name!r}: not of {allowed}")
    if not isinstance(content, str):
        raise SampleError(
            "bad_schema", f"messages[{index}].{content_key}: {content!r:.80} is not a text"
        )
    return {"role": role, "content": content}


def _system(record: dict[str, Any], dialect: Dialect) -> list[dict[str, str]]:
    """The system message that a record has beside its messages, with its tools' descriptions."""
    parts = [record.get(key) for key in (dialect.system, dialect.tools) if key]
    text = "\n\n".join(part for part in parts if isinstance(part, str) and part)
    return [{"role": "system", "content": text}] if text else []


def _media(record: dict[str, Any], column: str | None) -> list[Any]:
    value = record.get(column) if column else None
    if value is None or value == "":
        return []
    if isinstance(value, str | dict):
        return [value]
    if not isinstance(value, list):
        raise SampleError("bad_schema", f"{column}: expected a list of file names")
    return value


def _our_marks(text: str, media: bool) -> str:
    """LLaMA-Factory's `<image>` as our mark; in a record without media it is plain text."""
    if not media:
        return text
    return text.replace("<image>", IMAGE_MARK).replace("<video>", VIDEO_MARK)


def looks_like_one(record: dict[str, Any]) -> bool:
    return "messages" in record or "conversations" in record

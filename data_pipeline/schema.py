"""A sample's JSON, checked once: what `parse_sample` returns has the right types and counts."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from data_pipeline.strict_json import loads

IMAGE_MARK = "<|image|>"
VIDEO_MARK = "<|video|>"
MARK = re.compile(r"<\|(?:image|video)\|>")

Kind = Literal["caption", "chat", "realtime"]
Role = Literal["system", "user", "assistant"]
MediaType = Literal["image", "video"]
_KINDS, _ROLES, _MEDIA_TYPES = get_args(Kind), get_args(Role), get_args(MediaType)


class SampleError(Exception):
    """A sample that cannot be used.

    `reason` is a word that is counted (`bad_json`, `mark_media_mismatch`, ...), `detail`
    is what was wrong, `key` the sample (empty where it is not known).
    """

    def __init__(self, reason: str, detail: str, key: str = "") -> None:
        super().__init__(f"{key or 'sample'}: {reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.key = key

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str, str]]:
        """Lets the error travel between processes."""
        return SampleError, (self.reason, self.detail, self.key)


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    learn: bool = True  # False: an assistant's turn that is context alone


@dataclass(frozen=True)
class Media:
    type: MediaType
    file: str  # the member of the shard without the sample's key: "0.jpg"
    times: tuple[float, ...] | None = None  # seconds of the frames of a real-time video

    def realtime_times(self, marks: int) -> list[float]:
        """The seconds of a real-time video's frames: `times`, else one a second from 0."""
        return list(self.times or map(float, range(marks)))


@dataclass(frozen=True)
class Sample:
    key: str
    kind: Kind
    messages: tuple[Message, ...]
    media: tuple[Media, ...]

    def mark_media(self) -> list[int]:
        """For each mark of the conversation, in order, the index of the medium it shows."""
        owners, following = [], iter(range(len(self.media)))
        clip = self._realtime_clip()
        for mark in self._marks():
            if self.kind == "realtime" and mark == "video":
                owners.append(clip)
            else:
                owners.append(next(i for i in following if i != clip))
        return owners

    def _marks(self) -> list[str]:
        return [m[2:-2] for msg in self.messages for m in MARK.findall(msg.content)]

    def _realtime_clip(self) -> int:
        """The one video all of a real-time sample's `<|video|>` marks belong to, else -1."""
        if self.kind != "realtime":
            return -1
        return next((i for i, medium in enumerate(self.media) if medium.type == "video"), -1)


def member_named(file: str, members: Collection[str]) -> str | None:
    """The member of a sample that a name means: as it is written, else in another letter case,
    which some readers of tars change; None: there is none."""
    if file in members:
        return file
    plain = file.lower()
    return next((name for name in members if name.lower() == plain), None)


def described_by(key: str, parts: Mapping[str, bytes]) -> bytes:
    """A sample's JSON among its members; SampleError: there is none."""
    name = member_named("json", parts)
    if name is None:
        raise SampleError("missing_json", f"members: {', '.join(sorted(parts))}", key)
    return parts[name]


def parse_sample(key: str, raw: bytes | str | dict[str, Any]) -> Sample:
    """Reads and checks a sample's JSON; raises SampleError with the key, the reason, the field."""
    try:
        data = raw if isinstance(raw, dict) else loads(raw)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", str(error), key) from None
    try:
        if not isinstance(data, dict):
            raise SampleError("bad_schema", f"expected a JSON object, got {type(data).__name__}")
        sample = Sample(key, _kind(data), _messages(data), _media(data))
        _check_marks(sample)
        _check_answers(sample)
    except SampleError as error:
        raise SampleError(error.reason, error.detail, key) from None
    return sample


def _kind(data: dict[str, Any]) -> Kind:
    kind: Kind = data.get("kind", "chat")
    if kind not in _KINDS:
        raise SampleError("bad_schema", f"kind: {kind!r}, allowed: {', '.join(_KINDS)}")
    return kind


def _list(data: dict[str, Any], field: str) -> list[Any]:
    value = data.get(field, [])
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise SampleError("bad_schema", f"{field}: expected a list of objects, got {value!r:.80}")
    return value


def _messages(data: dict[str, Any]) -> tuple[Message, ...]:
    messages = []
    for i, entry in enumerate(_list(data, "messages")):
        role, content = entry.get("role"), entry.get("content")
        if role not in _ROLES:
            allowed = ", ".join(_ROLES)
            raise SampleError("bad_schema", f"messages[{i}].role: {role!r}, allowed: {allowed}")
        if not isinstance(content, str):
            raise SampleError("bad_schema", f"messages[{i}].content: {content!r:.80} is not a text")
        learn = entry.get("learn", True)
        if not isinstance(learn, bool):
            raise SampleError("bad_schema", f"messages[{i}].learn: {learn!r:.80}: true or false")
        messages.append(Message(role, content, learn))
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise SampleError("bad_schema", "messages: no assistant turn, so nothing to learn")
    if not any(message.learn for message in answers):
        raise SampleError("no_labels", "messages: every assistant turn is marked as context alone")
    return tuple(messages)


def _media(data: dict[str, Any]) -> tuple[Media, ...]:
    media = []
    for i, entry in enumerate(_list(data, "media")):
        kind, file = entry.get("type"), entry.get("file")
        if kind not in _MEDIA_TYPES:
            allowed = ", ".join(_MEDIA_TYPES)
            raise SampleError("bad_schema", f"media[{i}].type: {kind!r}, allowed: {allowed}")
        if not isinstance(file, str) or not file:
            raise SampleError("bad_schema", f"media[{i}].file: {file!r} is not a file name")
        media.append(Media(kind, file, _times(entry.get("times"), i)))
    return tuple(media)


def _times(value: Any, index: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and all(
        isinstance(t, int | float) and not isinstance(t, bool) and math.isfinite(t) and t >= 0
        for t in value
    )
    if not numbers or sorted(value) != value:
        raise SampleError(
            "bad_schema", f"media[{index}].times: {value!r:.80}: expected rising seconds >= 0"
        )
    return tuple(float(t) for t in value)


def _check_marks(sample: Sample) -> None:
    marks, clip = sample._marks(), sample._realtime_clip()
    if clip >= 0:
        shown = [m for m in marks if m == "image"]
        expected = [m.type for i, m in enumerate(sample.media) if i != clip]
        _check_clip(sample.media[clip], marks.count("video"))
    else:
        shown, expected = marks, [m.type for m in sample.media]
    if shown != expected:
        raise SampleError(
            "mark_media_mismatch",
            f"the text has the marks [{', '.join(shown)}], the media are [{', '.join(expected)}]",
        )


def _check_answers(sample: Sample) -> None:
    """An answer without text would teach to say nothing; in a stream silence has its token."""
    for i, message in enumerate(sample.messages if sample.kind != "realtime" else ()):
        learned = message.role == "assistant" and message.learn
        # A mark has no label.
        if learned and not MARK.sub("", message.content).strip():
            raise SampleError(
                "missing_text", f"messages[{i}]: the assistant's turn has no text: nothing to learn"
            )


def _check_clip(clip: Media, marks: int) -> None:
    if marks == 0:
        raise SampleError("mark_media_mismatch", f"the clip {clip.file} has no {VIDEO_MARK} mark")
    if clip.times is not None and len(clip.times) != marks:
        raise SampleError(
            "mark_media_mismatch",
            f"{marks} {VIDEO_MARK} marks, but {len(clip.times)} times for {clip.file}",
        )

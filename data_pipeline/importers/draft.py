"""What every importer makes of a record: a draft, its conversation and where its media are."""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote, unquote_to_bytes

from data_pipeline import files
from data_pipeline.importers.timeline import Timeline
from data_pipeline.schema import (
    IMAGE_MARK,
    MARK,
    VIDEO_MARK,
    Kind,
    MediaType,
    Role,
    SampleError,
)
from data_pipeline.tar_members import Extents, stored_size, with_holes

# `role`, `content` and, for an assistant's turn that is context alone, `learn`: False.
Turn = dict[str, Any]
Group = Literal["text", "image", "video", "realtime"]
_PLAIN_SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")


@dataclass(frozen=True)
class TarMember:
    """A file inside a tar that is not compressed: where its bytes lie."""

    tar: str
    name: str
    offset: int
    size: int
    extents: Extents = None

    def read(self) -> bytes:
        with files.open_file(self.tar) as file:
            file.seek(self.offset)
            stored = file.read(stored_size(self.size, self.extents))
        try:
            return with_holes(stored, self.size, self.extents)
        except ValueError as error:
            raise SampleError("unreadable_file", f"{self.name} in {self.tar}: {error}") from None


@dataclass(frozen=True)
class Medium:
    """A picture or video: its path or URL, its bytes, or where they lie in a tar."""

    type: MediaType
    content: str | bytes | TarMember
    suffix: str = ""
    times: tuple[float, ...] | None = None  # seconds of a real-time clip's frames
    part: tuple[float, float] | None = None  # seconds of the file that are the clip

    def member(self, index: int) -> str:
        """The medium's name in the shard: `0.jpg`."""
        return f"{index}{self.suffix if _PLAIN_SUFFIX.fullmatch(self.suffix) else '.bin'}"


@dataclass(frozen=True)
class Draft:
    """A record whose media have not been read yet, in the order of their marks.

    timeline: of a real-time clip whose messages are not made before its length is known.
    """

    messages: list[Turn]
    media: list[Medium] = field(default_factory=list)
    kind: Kind = "chat"
    caption_file: str | None = None  # a text file: the content of the last message
    notes: tuple[str, ...] = ()  # what was given and is not used: counted in the summary
    timeline: Timeline | None = None

    @property
    def group(self) -> Group:
        """The folder of shards that it belongs to."""
        if self.kind == "realtime":
            return "realtime"
        types = {medium.type for medium in self.media}
        return "video" if "video" in types else "image" if "image" in types else "text"


# Under which names messages have a role. A tool's answer is the user's turn; its call the model's.
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "observation": "user",
    "tool": "user",
    "tool_response": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "function": "assistant",
    "tool_call": "assistant",
}


def role_of(name: Any) -> Role | None:
    """The role that a message names, in whatever letter case; None: it is not known."""
    return ROLES.get(name.lower()) if isinstance(name, str) else None


# A record and the folder of its media -> what it becomes; a long one may become several samples.
Convert = Callable[[dict[str, Any], str], Draft | list[Draft]]


@dataclass(frozen=True)
class Entry:
    """One record of a source; `draft` is a SampleError where the record cannot be used."""

    key: str
    file: str  # shown in messages: the file that the record is in
    share: float  # of the source read so far, 0..1
    draft: Draft | SampleError
    index: int = -1  # its place among all records of the source

    @property
    def group(self) -> Group:
        return self.draft.group if isinstance(self.draft, Draft) else "text"


# Under which names an object has its path.
PATH_FIELDS = (
    "path", "url", "video_path", "image_path", "file", "file_name", "image", "video",
)  # fmt: skip
# Under which names records on their own have their media; the first is LLaMA-Factory's.
IMAGE_FIELDS = ("images", "image", "image_path", "image_paths", "image_url", "image_urls")
VIDEO_FIELDS = ("videos", "video", "video_path", "video_paths", "video_url", "video_urls")
VIDEO_IDS = ("video_uid", "video_id", "video_name")  # names without a suffix
NOTHING = frozenset({"nan", "NaN", "null", "NULL", "None", "<NA>"})  # how tables say it
MEDIUM_FIELDS = frozenset((*PATH_FIELDS, "bytes", "type"))
_WINDOWS = re.compile(r"(?:file:///)?[A-Za-z]:[\\/]|\\\\")
# How base64 of a JPEG, PNG, WebP, GIF, MP4 and Matroska file begins, and how long it is at least.
_BASE64 = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "AAAA", "GkXfo")
_SHORTEST = 256


def plain_path(path: str) -> str:
    """A path as it is written here: of Windows without its drive, of a `file://` URL its path."""
    if path.startswith("file://"):
        path = unquote(path)
    if windows := _WINDOWS.match(path):
        return "/" + path[windows.end() :].replace("\\", "/")
    if path.startswith("file://"):
        return path.removeprefix("file://")
    return path if "/" in path else path.replace("\\", "/")


def as_list(value: Any) -> list[Any]:
    """A list as it is; anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def medium_name(value: Any) -> str | None:
    """The path or URL by which a record names a medium, to compare; None: it has bytes alone."""
    if isinstance(value, dict):
        value = next((value[name] for name in PATH_FIELDS if value.get(name)), None)
    if not isinstance(value, str):
        return None
    path = plain_path(value)
    while path.startswith("./"):
        path = path[2:]
    return path


def names_medium(value: Any) -> bool:
    """Whether a field holds something: parquet has `{"bytes": None, "path": None}` for nothing."""
    if isinstance(value, dict):
        return any(one is not None for one in value.values())
    return bool(value)


def may_name_medium(value: Any) -> bool:
    """Whether it is something by which a medium is named, and not how many there are, say."""
    return isinstance(value, str | bytes | dict | list) and names_medium(value)


def medium(kind: MediaType, value: Any, base: str) -> Medium:
    """The picture or video that a record names, by path or URL, or holds: as `{"bytes": ...}`, as
    a `data:` URL or as base64.

    `base`: the folder of relative paths.
    """
    if isinstance(value, bytes):
        return Medium(kind, value)
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return Medium(kind, value["bytes"], files.suffix(value.get("path") or ""))
    path = value
    if isinstance(value, dict):
        path = next((value[name] for name in PATH_FIELDS if value.get(name)), None)
    if isinstance(path, list) and kind == "video":
        raise frames_as_pictures(path)
    if not isinstance(path, str) or not path:
        raise SampleError("bad_schema", f"{kind}: {value!r:.80} is not a path")
    if held := _held(kind, path):
        return held
    path = plain_path(path)
    try:
        return Medium(kind, files.join(base, path), files.suffix(path))
    except ValueError as error:  # a URL that cannot be one
        raise SampleError("bad_schema", f"{kind}: {path!r:.80}: {error}") from None


def frames_as_pictures(paths: Any) -> SampleError:
    detail = f"video: {paths!r:.80}: frames as pictures: make a video of them (ffmpeg -framerate)"
    return SampleError("bad_schema", f"{detail}, or name them as images")


def _held(kind: MediaType, text: str) -> Medium | None:
    """The medium that a text is instead of its path; None: it is a path. Raises SampleError."""
    url = text[:5].lower() == "data:"
    if not url and (len(text) < _SHORTEST or not text.startswith(_BASE64)):
        return None
    head, _, body = text.partition(",") if url else ("base64", ",", text)
    suffix = "." + head[5:].partition(";")[0].rpartition("/")[2].lower() if url else ""
    if url and not head.lower().endswith("base64"):
        return Medium(kind, unquote_to_bytes(body), suffix)
    try:
        data = base64.b64decode("".join(unquote(body).split()), validate=True)
        return Medium(kind, data, suffix)
    except (binascii.Error, ValueError) as error:
        detail = f"{kind}: {text[:40]!r}...: is not base64: {error}"
        raise SampleError("bad_schema", detail) from None


def unused_fields(record: Mapping[str, Any], known: Container[str], where: str = "") -> list[str]:
    """A note for each field of a record that holds something and means nothing to a form."""
    return [
        f"unused field {where}{name}"
        for name, value in record.items()
        if name not in known and not (value is None or value in ("", [], {}))
    ]


def media_type(path: str) -> MediaType | None:
    """The type of medium that a path's suffix says."""
    suffix = files.suffix(path)
    if suffix in files.IMAGE_SUFFIXES:
        return "image"
    return "video" if suffix in files.VIDEO_SUFFIXES else None


def surely_medium(path: str) -> bool:
    """Whether a path's suffix is that of a picture or video alone: `.ts` is TypeScript's, too."""
    return media_type(path) is not None and files.suffix(path) != ".ts"


def in_order(messages: list[Turn], by_kind: dict[MediaType, list[Medium]]) -> list[Medium]:
    """The media in the order of their marks; SampleError where counts do not agree."""
    left = {kind: list(media) for kind, media in by_kind.items()}
    media: list[Medium] = []
    text = "".join([message["content"] for message in messages])
    for mark in MARK.findall(text) if "<|" in text else ():
        kind: MediaType = "image" if mark == IMAGE_MARK else "video"
        if not left.get(kind):
            raise SampleError("mark_media_mismatch", f"more {mark} marks than {kind}s")
        media.append(left[kind].pop(0))
    extra = sum(len(rest) for rest in left.values())
    if extra:
        kind = next(kind for kind, rest in left.items() if rest)
        raise SampleError("mark_media_mismatch", f"no mark for {extra} of the media: write "
                          f"<{kind}> in a text where each belongs")  # fmt: skip
    return media


def caption_draft(
    medium: Medium, caption: str = "", caption_file: str | None = None, notes: tuple[str, ...] = ()
) -> Draft:
    """A picture or video and its caption, for the pretraining stages."""
    mark = IMAGE_MARK if medium.type == "image" else VIDEO_MARK
    messages = [{"role": "user", "content": mark}, {"role": "assistant", "content": caption}]
    return Draft(messages, [medium], "caption", caption_file, notes)


def text_draft(text: Any, notes: tuple[str, ...] = ()) -> Draft:
    """Plain text; all of it has a loss."""
    if not isinstance(text, str) or not text.strip():
        raise SampleError("missing_text", f"text: {text!r:.80} is not a text")
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]
    return Draft(messages, kind="caption", notes=notes)


def distinct_stems(names: list[str]) -> list[str]:
    """What the keys of each file's records start with: all different, without dots."""
    stems: list[str] = []
    used: set[str] = set()
    for name in names:
        # Plain and short, so that every tar has it in its plain header.
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", name).lstrip("_")[:64] or "records"
        numbered = (f"{plain}_{number}" for number in itertools.count(2))
        stems.append(plain if plain not in used else next(s for s in numbered if s not in used))
        used.add(stems[-1])
    return stems

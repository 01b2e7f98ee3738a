"""Records in ShareGPT form (messages, images, videos) to samples of our shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.images import decode_image
from data_pipeline.schema import MARK, VIDEO_MARK, Sample, SampleError, parse_sample
from data_pipeline.video import probe_video

_REALTIME = "[RealTime QA]"
_INFO = f"{_REALTIME}[INFO]"
_PLACEHOLDER = f"{_REALTIME}[PLACEHOLDER]"
_EVENTS = "[Streaming Event Caption]"


def convert_record(key: str, record: Any, folder: Path) -> dict[str, Any]:
    """One record -> a checked sample as write_shards takes it.

    Media paths are relative to `folder`; the files are read and tried. Raises SampleError with
    the key and the reason: `missing_file`, `mark_media_mismatch`, `undecodable_video`, ...
    """
    try:
        if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
            raise SampleError("bad_schema", "a record must be an object with a list `messages`")
        images, videos = (_paths(record, field) for field in ("images", "videos"))
        if videos and videos[0].startswith(_EVENTS):
            raise SampleError("unsupported_form", f"{_EVENTS} records cannot be imported yet")
        realtime = is_realtime(videos)
        media = _clip(videos, record) if realtime else _in_order(record, images, videos)
        if realtime and images:
            raise SampleError("unsupported_form", "a real-time record with images")
        members = {medium["file"]: _read(folder / medium.pop("path")) for medium in media}
        data = {
            "messages": record["messages"],
            "media": media,
            "kind": "realtime" if realtime else "chat",
        }
        sample = parse_sample(key, data)
        _try_media(sample, members)
    except SampleError as error:
        raise SampleError(error.reason, error.detail, key) from None
    return {"__key__": key, "json": data, **members}


def is_realtime(videos: Any) -> bool:
    """Whether a record's `videos` entry is that of a conversation that follows the clock."""
    first = videos[0] if isinstance(videos, list) and videos else None
    return isinstance(first, str) and first.startswith((_REALTIME, _EVENTS))


def _paths(record: Mapping[str, Any], field: str) -> list[str]:
    value = record.get(field) or []
    if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
        raise SampleError("bad_schema", f"{field}: expected a list of file names")
    return value


def _text(record: Mapping[str, Any]) -> str:
    contents = [m.get("content") for m in record["messages"] if isinstance(m, dict)]
    return "".join(content for content in contents if isinstance(content, str))


def _in_order(
    record: Mapping[str, Any], images: list[str], videos: list[str]
) -> list[dict[str, Any]]:
    """Media entries in the order of their marks."""
    left = {"image": list(images), "video": list(videos)}
    media: list[dict[str, Any]] = []
    for mark in MARK.findall(_text(record)):
        kind = mark[2:-2]
        if not left[kind]:
            raise SampleError("mark_media_mismatch", f"more {mark} marks than {kind}s")
        path = left[kind].pop(0)
        media.append({"type": kind, "file": _member(len(media), path), "path": path})
    extra = left["image"] + left["video"]
    if extra:
        raise SampleError("mark_media_mismatch", f"no mark for {', '.join(extra)}")
    return media


def _clip(videos: list[str], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The one video of a real-time record, with the second of each of its marks."""
    if not videos[0].startswith(_INFO) or any(entry != _PLACEHOLDER for entry in videos[1:]):
        raise SampleError(
            "bad_schema", f"videos: expected one {_INFO} entry, then only {_PLACEHOLDER}"
        )
    try:
        info = json.loads(videos[0].removeprefix(_INFO))
        path, times = info["video_path"], [_seconds(stamp) for stamp in info["time_info"]]
        clip = {"type": "video", "file": _member(0, path), "path": path, "times": times}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SampleError("bad_schema", f"videos[0]: {error!r}") from None
    marks = _text(record).count(VIDEO_MARK)
    if not len(videos) == len(times) == marks:
        raise SampleError(
            "mark_media_mismatch",
            f"{marks} {VIDEO_MARK} marks, {len(videos)} entries in videos, {len(times)} times",
        )
    return [clip]


def _seconds(stamp: str) -> float:
    """`01:05` -> 65.0; hours may stand before, fractions of a second behind."""
    total = 0.0
    for part in stamp.split(":"):
        total = total * 60 + float(part)
    return total


def _member(index: int, path: str) -> str:
    return f"{index}{Path(path).suffix.lower() or '.bin'}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError("missing_file", f"{path.name}: {error.strerror}") from None


def _try_media(sample: Sample, members: Mapping[str, bytes]) -> None:
    for medium in sample.media:
        if medium.type == "image":
            decode_image(members[medium.file])
            continue
        info = probe_video(members[medium.file])
        if medium.times and medium.times[-1] >= info.last + 1.0:
            raise SampleError(
                "frame_after_end",
                f"a frame at {medium.times[-1]:.2f} s, the last is at {info.last:.2f} s",
            )

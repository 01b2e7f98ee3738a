"""Records of MOSS-Video's real-time data, `[RealTime QA]` and `[Streaming Event Caption]`.

A record has one clip. The first of its `videos` is the mode, `[INFO]` and a JSON object with
`video_path` and `time_info`; the others are the mode and `[PLACEHOLDER]`, one for each further
mark. In `[RealTime QA]` each mark is one frame, and `time_info` has its second. In `[Streaming
Event Caption]` `time_info` has the events: each mark becomes the frames, one a second, up to the
end of the event whose caption follows it.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

from data_pipeline import files
from data_pipeline.importers.draft import Draft, Medium, Turn
from data_pipeline.importers.timeline import LONGEST
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, SampleError
from data_pipeline.seconds import parse_seconds
from data_pipeline.strict_json import loads

_REALTIME = "[RealTime QA]"
_EVENTS = "[Streaming Event Caption]"


def is_realtime(videos: Any) -> bool:
    """Whether a record's `videos` are those of a real-time conversation."""
    first = videos[0] if isinstance(videos, list) and videos else None
    return isinstance(first, str) and first.startswith((_REALTIME, _EVENTS))


def realtime_draft(
    messages: list[Turn], pictures: list[Medium], videos: list[Any], base: str
) -> Draft:
    """The draft of such a record; SampleError where its parts do not agree."""
    mode = _REALTIME if videos[0].startswith(_REALTIME) else _EVENTS
    if any(entry != f"{mode}[PLACEHOLDER]" for entry in videos[1:]):
        raise SampleError(
            "bad_schema", f"videos: expected one {mode}[INFO] entry, then only {mode}[PLACEHOLDER]"
        )
    path, stamps = _info(videos[0], mode)
    marks = sum(message["content"].count(VIDEO_MARK) for message in messages)
    if not len(videos) == len(stamps) == marks:
        raise SampleError(
            "mark_media_mismatch",
            f"{marks} {VIDEO_MARK} marks, {len(videos)} entries in videos, {len(stamps)} times",
        )
    again = sum(after == before for before, after in pairwise(stamps))
    notes = ("frame of the same second as the one before",) * again if mode == _REALTIME else ()
    if mode == _EVENTS:
        messages, stamps = _spread(messages, stamps)
    mark_count = sum(message["content"].count(IMAGE_MARK) for message in messages)
    if mark_count != len(pictures):
        raise SampleError(
            "mark_media_mismatch", f"{mark_count} {IMAGE_MARK}, {len(pictures)} images"
        )
    clip = Medium("video", files.join(base, path), files.suffix(path), tuple(stamps))
    return Draft(messages, [clip, *pictures], "realtime", notes=notes)


def _info(entry: str, mode: str) -> tuple[str, list[float]]:
    """The clip's path and the second of each mark: its frame's, or its event's end."""
    try:
        if not entry.startswith(f"{mode}[INFO]"):
            raise ValueError(f"it does not start with {mode}[INFO]")
        info = loads(entry.removeprefix(f"{mode}[INFO]"))
        path, times = info["video_path"], info["time_info"]
        stamps = _ends(times) if mode == _EVENTS else [_seconds(time) for time in times]
        if not isinstance(path, str) or not path:
            raise ValueError(f"video_path: {path!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SampleError("bad_schema", f"videos[0]: {error!r}") from None
    return path, stamps


def _ends(events: Any) -> list[float]:
    """The second at which each event ends; SampleError for one that ends before it starts, or
    before the one that was told before it: its caption would stand at a later second."""
    ends: list[float] = []
    for i, event in enumerate(events):
        end = _seconds(event["end"])
        start = _seconds(event.get("start", 0.0))
        if end < start:
            detail = f"time_info[{i}]: it ends at {end:g} s, before {start:g} s"
            raise SampleError("bad_time", detail)
        if ends and end < ends[-1]:
            detail = f"time_info[{i}]: it ends at {end:g} s, the event before at {ends[-1]:g} s"
            raise SampleError("bad_time", f"{detail}: sort the events by their ends")
        ends.append(end)
    return ends


def _spread(messages: list[Turn], ends: list[float]) -> tuple[list[Turn], list[float]]:
    """Replaces each mark by one for each frame: the whole seconds since the event before ended."""
    counts, frame_count = [], 0
    for end in ends:
        # An event that ends in the same second as the one before still gets a frame of its own.
        last = max(math.floor(end), frame_count)
        counts.append(last + 1 - frame_count)
        frame_count = last + 1
    left = iter(counts)
    spread = [
        message
        | {
            "content": re.sub(
                re.escape(VIDEO_MARK), lambda _: VIDEO_MARK * next(left), message["content"]
            )
        }
        for message in messages
    ]
    return spread, [float(second) for second in range(frame_count)]


def _seconds(stamp: Any) -> float:
    """Seconds of a stamp as `parse_seconds` takes it, `01:05` among them."""
    try:
        total = parse_seconds(stamp)
    except ValueError as error:
        raise ValueError(f"time_info: {error}") from None
    if total > LONGEST:
        raise ValueError(f"time_info: {stamp!r}: expected seconds from 0 to {LONGEST}")
    return total

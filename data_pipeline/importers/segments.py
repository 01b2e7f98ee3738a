"""MOSS-VL's records: `messages` or `conversations`, `videos` with `segments`, and Realtime-QA's.

A mark stands for a segment: `[second]` is one frame, `[start, end]` the seconds from start on,
without end. A record whose answers have the marks among their words is a stream, and its segments
its frames; in any other one a segment is cut out of its video. `prompt` and `response` are a
conversation of one turn whose media stand first. Realtime-QA has `video.frame_timestamps` in place
of segments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data_pipeline.importers.conversation import (
    Dialect,
    conversation_draft,
    message_turns,
    messages_field,
)
from data_pipeline.importers.draft import PATH_FIELDS, Draft, Medium, Turn, medium, unused_fields
from data_pipeline.importers.marks import place_marks
from data_pipeline.importers.streaming import clip_of
from data_pipeline.importers.timeline import LONGEST, SILENCE, second_of
from data_pipeline.schema import IMAGE_MARK, MARK, VIDEO_MARK, MediaType, SampleError
from data_pipeline.strict_json import loads

_ABOUT = ("metadata", "video_duration_seconds", "task_type", "source")
_IDS = ("id", "video_id", "youtube_id", "yt_id", "name")


def has_segments(record: dict[str, Any]) -> bool:
    videos = record.get("videos")
    return isinstance(videos, list) and any(
        isinstance(video, dict) and video.get("segments") is not None for video in videos
    )


def has_prompt(record: dict[str, Any]) -> bool:
    return isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str)


def mossvl_draft(record: dict[str, Any], base: str) -> Draft:
    """A record of MOSS-VL -> a draft; SampleError."""
    record = _with_messages(record)
    if not has_segments(record):
        return conversation_draft(record, base)
    dialect = Dialect(messages=messages_field(record))
    cut = list(_segments(record["videos"], base))
    notes = unused_fields(record, {*dialect.known, *_ABOUT})
    pictures = [medium("image", image, base) for image in record.get("images") or []]
    by_kind: dict[MediaType, list[Any]] = {"image": pictures, "video": cut}
    messages = place_marks(message_turns(record, dialect), by_kind, notes)
    answers = "".join(turn["content"] for turn in messages if turn["role"] == "assistant")
    stream = VIDEO_MARK in answers or SILENCE in answers or any(end is None for _, _, end in cut)
    if stream:
        return _stream(messages, cut, pictures, notes)
    clips = [replace(clip, part=(start, end or start + 1)) for clip, start, end in cut]
    media = [*_in_order(messages, pictures, clips)]
    return Draft(messages, media, notes=tuple(notes))


def _with_messages(record: dict[str, Any]) -> dict[str, Any]:
    """`prompt` and `response` as a conversation, the media's marks before the prompt."""
    if not has_prompt(record):
        return record
    rest = {k: v for k, v in record.items() if k not in ("prompt", "response", "system_prompt")}
    videos = record.get("videos") or []
    count = sum(
        len(video["segments"]) if isinstance(video, dict) and video.get("segments") else 1
        for video in videos
    )
    marks = IMAGE_MARK * len(record.get("images") or []) + VIDEO_MARK * count
    marks = "" if MARK.search(record["prompt"]) else marks
    turns = [
        {"role": "user", "content": f"{marks}\n{record['prompt']}" if marks else record["prompt"]},
        {"role": "assistant", "content": record["response"]},
    ]
    if record.get("system_prompt"):
        turns.insert(0, {"role": "system", "content": record["system_prompt"]})
    return rest | {"messages": turns}


def _segments(videos: list[Any], base: str) -> Iterator[tuple[Medium, float, float | None]]:
    """The clip, first second and end of each segment; no end: it is one frame."""
    for i, video in enumerate(videos):
        segments = video.get("segments") if isinstance(video, dict) else None
        if not isinstance(segments, list):
            raise SampleError("bad_schema", f"videos[{i}]: expected video_path and segments")
        clip = medium("video", {name: video.get(name) for name in ("bytes", *PATH_FIELDS)}, base)
        for n, segment in enumerate(segments):
            field = f"videos[{i}].segments[{n}]"
            if not isinstance(segment, list) or len(segment) not in (1, 2):
                raise SampleError("bad_schema", f"{field}: {segment!r:.40}: [second], [start, end]")
            start, *end = (second_of(time, field) for time in segment)
            if end and end[0] <= start:
                raise SampleError(
                    "bad_time", f"{field}: it ends at {end[0]:g} s, not after {start:g} s"
                )
            yield clip, start, end[0] if end else None


def _stream(
    messages: list[Turn],
    cut: list[tuple[Medium, float, float | None]],
    pictures: list[Medium],
    notes: list[str],
) -> Draft:
    clips = {clip.content: clip for clip, _, _ in cut}
    if len(clips) != 1:
        raise SampleError("several_clips", f"{len(clips)} videos: a stream has one")
    seconds = [
        [start] if end is None else [start + i for i in range(math.ceil(end - start))]
        for _, start, end in cut
    ]
    ((_, clip),) = clips.items()
    messages, times = _spread(messages, seconds)
    return Draft(messages, [replace(clip, times=times), *pictures], "realtime", notes=tuple(notes))


def _spread(
    messages: list[Turn], seconds: list[list[float]]
) -> tuple[list[Turn], tuple[float, ...]]:
    """A mark for each frame of each segment, and the frames' seconds."""
    marks = sum(turn["content"].count(VIDEO_MARK) for turn in messages)
    if marks != len(seconds):
        raise SampleError(
            "mark_media_mismatch", f"{marks} {VIDEO_MARK} marks, {len(seconds)} segments or frames"
        )
    times = tuple(time for segment in seconds for time in segment)
    if list(times) != sorted(set(times)):
        raise SampleError("bad_time", f"segments that overlap or go back: {list(times)!r:.80}")
    if len(times) > LONGEST:
        raise SampleError("bad_time", f"{len(times)} frames, more than {LONGEST}")
    left = iter(seconds)
    return [
        turn
        | {
            "content": re.sub(
                re.escape(VIDEO_MARK), lambda _: VIDEO_MARK * len(next(left)), turn["content"]
            )
        }
        for turn in messages
    ], times


def _in_order(
    messages: list[Turn], pictures: list[Medium], clips: list[Medium]
) -> Iterator[Medium]:
    left = {IMAGE_MARK: iter(pictures), VIDEO_MARK: iter(clips)}
    text = "".join(turn["content"] for turn in messages)
    for mark, media in ((IMAGE_MARK, pictures), (VIDEO_MARK, clips)):
        if text.count(mark) != len(media):
            raise SampleError(
                "mark_media_mismatch", f"{text.count(mark)} {mark} marks, {len(media)} media"
            )
    for mark in MARK.findall(text):
        yield next(left[mark])


def realtime_qa_draft(record: dict[str, Any], base: str) -> Draft:
    """Realtime-QA's record: its frames are at `video.frame_timestamps`."""
    video = _video(record)
    stamps = video.get("frame_timestamps")
    if not isinstance(stamps, list) or not stamps:
        raise SampleError("bad_schema", f"video.frame_timestamps: {stamps!r:.40}: expected seconds")
    seconds = [second_of(stamp, f"video.frame_timestamps[{i}]") for i, stamp in enumerate(stamps)]
    dialect = Dialect(messages=messages_field(record))
    notes = unused_fields(record, {*dialect.known, *_ABOUT, "video"})
    pictures = [medium("image", image, base) for image in record.get("images") or []]
    frames: dict[MediaType, list[Any]] = {"image": pictures, "video": seconds}
    messages = place_marks(message_turns(record, dialect), frames, notes)
    marks = sum(turn["content"].count(VIDEO_MARK) for turn in messages)
    one = marks == 1 and len(seconds) > 1  # a mark for all frames
    messages, times = _spread(messages, [seconds] if one else [[second] for second in seconds])
    clip = replace(_clip(video, record, base), times=times)
    return Draft(messages, [clip, *pictures], "realtime", notes=tuple(notes))


def has_frame_timestamps(record: dict[str, Any]) -> bool:
    try:
        return "frame_timestamps" in _video(record)
    except SampleError:
        return False


def _video(record: dict[str, Any]) -> dict[str, Any]:
    video = record.get("video")
    if isinstance(video, str) and video.lstrip().startswith("{"):
        try:
            video = loads(video)
        except ValueError as error:
            raise SampleError("bad_schema", f"video: {error}") from None
    if not isinstance(video, dict):
        raise SampleError("bad_schema", f"video: {video!r:.80}: expected frame_timestamps")
    return video


def _clip(video: dict[str, Any], record: dict[str, Any], base: str) -> Medium:
    """The record's video by its path or bytes, else by its id, which is the name of a file among
    the media."""
    if isinstance(video.get("bytes"), bytes) or any(video.get(name) for name in PATH_FIELDS):
        return medium("video", video, base)
    ids = [str(part[name]) for part in (video, record) for name in _IDS if part.get(name)]
    return medium("video", ids[0], base) if ids else clip_of(record, base)

"""Makes a sample of a draft: reads, decodes and, if asked to, shrinks its media.

The workers of an import do this.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image
from torch import Tensor

from data_pipeline import files
from data_pipeline.clock import EPSILON
from data_pipeline.fields import check_values, number
from data_pipeline.h264 import h264_stream
from data_pipeline.images import decode_image
from data_pipeline.importers.draft import Draft, Entry, Group, Medium, TarMember, Turn
from data_pipeline.importers.timeline import Timeline, unroll
from data_pipeline.schema import Sample, SampleError, parse_sample
from data_pipeline.shards import ShardError
from data_pipeline.video import Video, VideoInfo, check_end, open_video, probe_video

_JPEG_QUALITY = 92
_MARK, _BROKEN = "\ufeff", {"U+FFFD": "\ufffd", "NUL": "\0"}
# How GIF, WebP and TIFF files begin.
_SEQUENCES = (b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TICK = Fraction(1, 90000)  # seconds
_WORTH_A_CUT = 1.5  # times the seconds that are shown: a longer video is cut


@dataclass(frozen=True)
class MediaOptions:
    """Limits; media beyond them are encoded anew. None: they are kept as they are."""

    max_side: int | None = number(None, least=16)  # pixels of the longer side
    video_fps: float | None = number(None, above=0)  # frames a second

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class Outcome:
    """A record after its import: its sample, as ShardWriter takes it, or why it has none."""

    index: int
    key: str
    file: str
    group: Group
    share: float
    sample: dict[str, Any] | SampleError
    notes: tuple[str, ...] = ()  # what was given and is not used


def finish(entry: Entry, options: MediaOptions) -> Outcome:
    """Makes the sample of an entry."""
    notes: list[str] = []
    sample = _sample(entry, options, notes)
    return Outcome(
        entry.index, entry.key, entry.file, entry.group, entry.share, sample, tuple(notes)
    )


def _sample(entry: Entry, options: MediaOptions, notes: list[str]) -> dict[str, Any] | SampleError:
    """`notes` gets what is worth a count in the summary."""
    if isinstance(entry.draft, SampleError):
        return entry.draft
    try:
        notes += entry.draft.notes
        return _members(entry, entry.draft, options, notes)
    except SampleError as error:
        return error
    except (MemoryError, ShardError):
        raise
    except Exception as error:  # of any kind, from decoders: one record must not end an import
        return SampleError(f"unexpected_{type(error).__name__}", str(error))


def _members(entry: Entry, draft: Draft, options: MediaOptions, notes: list[str]) -> dict[str, Any]:
    messages = draft.messages
    if draft.caption_file is not None:
        caption = files.decode_text(files.read_bytes(draft.caption_file), draft.caption_file)
        if not caption.strip():
            raise SampleError("missing_caption", f"{draft.caption_file} has no text")
        messages = [*messages[:-1], messages[-1] | {"content": caption.strip()}]
    media: list[dict[str, Any]] = []
    members: dict[str, bytes] = {}
    sources = draft.media
    if draft.timeline is not None:
        messages, sources = _unrolled(draft, draft.timeline, notes)
    messages = [_plain(message, i) for i, message in enumerate(messages)]
    for index, medium in enumerate(sources):
        with _named(medium, index):
            fitted, suffix = _fitted(medium, options, notes)
        if medium.type == "image" and is_sequence(fitted):
            notes.append("animated picture, of which the first one is shown")
        name = Medium(medium.type, b"", suffix).member(index)
        members[name] = fitted
        times = {} if medium.times is None else {"times": list(medium.times)}
        media.append({"type": medium.type, "file": name, **times})
    origin = entry.file.encode(errors="backslashreplace").decode()  # of names that are not UTF-8
    data = {"messages": messages, "media": media, "kind": draft.kind, "origin": origin}
    _check_clip(parse_sample(entry.key, data), members)
    try:
        encoded = json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
        raise SampleError("bad_text", str(error)) from None
    return {"__key__": entry.key, "json": encoded, **members}


def _unrolled(
    draft: Draft, timeline: Timeline, notes: list[str]
) -> tuple[list[Turn], list[Medium]]:
    """The conversation of a timeline, and the clip with the seconds of its frames."""
    if timeline.pictures:
        unrolled = unroll(timeline, None)
        clips = draft.media
    else:
        (clip,) = draft.media
        with _named(clip):
            data = _bytes(clip)
            info = probe_video(data)
        unrolled = unroll(timeline, info)
        first, last = unrolled.times[0], unrolled.times[-1]
        clip = replace(clip, content=data, times=unrolled.times)
        if info.duration > _WORTH_A_CUT * (last + 1 - first):
            times = tuple(time - first for time in unrolled.times)
            clip = replace(clip, part=(first, last + 1), times=times)
        clips = [clip]
    notes += unrolled.notes
    return [dict(message) for message in unrolled.messages], clips


@contextmanager
def _named(medium: Medium, index: int = 0) -> Iterator[None]:
    """Errors of a medium name it, if they do not yet."""
    content = medium.content
    path = content.name if isinstance(content, TarMember) else content
    name = path if isinstance(path, str) else f"{medium.type} {index}"
    try:
        yield
    except SampleError as error:
        if isinstance(path, str) and files.name(path) in error.detail:
            raise
        raise SampleError(error.reason, f"{name}: {error.detail}") from None


def _bytes(medium: Medium) -> bytes:
    content = medium.content
    if isinstance(content, str):
        return files.read_bytes(content)
    return content.read() if isinstance(content, TarMember) else content


def _plain(message: Turn, index: int) -> Turn:
    """The message without byte order marks; SampleError for what only a wrong decoding leaves
    behind."""
    text = message["content"]
    if text.isascii() and "\0" not in text:
        return message
    if _MARK in text:
        text = text.replace(_MARK, "")
    for name, sign in _BROKEN.items():
        if sign in text:
            place = text.index(sign)
            raise SampleError("bad_text", f"message {index}, character {place}: {name}: the text "
                              "was read in a wrong encoding")  # fmt: skip
    return message | {"content": text}


def is_sequence(data: bytes) -> bool:
    """Whether a picture that can be read is animated, or has several pages."""
    may_be = data.startswith(_SEQUENCES) or data[4:12] == b"ftypavis"
    if not may_be and not (data[:4] == b"\x89PNG" and b"acTL" in data[:4096]):
        return False
    with Image.open(io.BytesIO(data)) as image:
        return getattr(image, "n_frames", 1) > 1


def _fitted(medium: Medium, options: MediaOptions, notes: list[str]) -> tuple[bytes, str]:
    """The bytes and suffix of a medium that has been decoded, cut or shrunk where it must be."""
    data = _bytes(medium)
    if medium.type == "image":
        picture = decode_image(data)
        if options.max_side is None or max(picture.shape[-2:]) <= options.max_side:
            return data, medium.suffix
        return shrink_image(picture, options.max_side), ".jpg"
    with open_video(data) as video:
        info = video.info
        frame = next(video.frames([0.0]))
    if info.frames == 1:
        notes.append("video of one frame")
    length = info.duration - info.first
    rate = info.frames / length if length else 0.0
    slower = options.video_fps is not None and rate > options.video_fps * 1.01
    smaller = options.max_side is not None and max(frame.shape[-2:]) > options.max_side
    part = medium.part and _part_to_cut(medium.part, info, notes)
    if part is None and not slower and not smaller:
        return data, medium.suffix
    fps = options.video_fps if slower else None
    return shrink_video(data, options.max_side, fps, part), ".mp4"


def _part_to_cut(
    part: tuple[float, float], info: VideoInfo, notes: list[str]
) -> tuple[float, float] | None:
    """The part where it is to be cut out of the file; None: the file is all of it. SampleError."""
    if _is_cut_already(part, info):
        notes.append("video that is no longer than its start and end say: taken as cut already")
        return None
    _check_part(part, info)
    if part[0] == 0 and part[1] > info.last:  # no frame would be left out
        return None
    notes.append("clip cut out of a longer video, encoded anew")
    return part


def _is_cut_already(part: tuple[float, float], info: VideoInfo) -> bool:
    """Whether a file is the part itself: as long as that, and it ends before that would."""
    length = part[1] - part[0]
    return info.duration + 1 < part[1] < math.inf and abs(info.duration - length) <= 1


def _check_part(part: tuple[float, float], info: VideoInfo) -> None:
    """SampleError for a part that is not in the video; its end may be rounded up, or unknown."""
    check_end([part[0]], info)
    if info.duration + 1 < part[1] < math.inf:
        raise SampleError(
            "frame_after_end",
            f"{part[0]:g} s to {part[1]:g} s is wanted, the video ends at {info.duration:.2f} s",
        )


def shrink_image(picture: Tensor, max_side: int) -> bytes:
    """uint8 [3, H, W] -> JPEG whose longer side has `max_side` pixels."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_JPEG_QUALITY)
    return out.getvalue()


def shrink_video(
    data: bytes,
    max_side: int | None,
    fps: float | None,
    part: tuple[float, float] | None = None,
) -> bytes:
    """An upright H.264 MP4 without sound, whose frames are on screen when they were.

    `fps`: one frame each 1/fps s from 0; None keeps every frame. `part`: the seconds that are kept;
    the first of them becomes 0.
    """
    out, packets = io.BytesIO(), []
    with open_video(data) as video, av.open(out, "w", format="mp4") as container:
        start, end = part or (0.0, math.inf)
        end = min(end, video.info.duration)
        times = _moments(video, fps)
        if part is not None:
            times = [start, *(time for time in times if start + EPSILON < time < end - EPSILON)]
        stream = None
        for moment, frame in zip(times, video.frames(times), strict=True):
            height, width = frame.shape[-2:]
            scale = min(1.0, (max_side or max(height, width)) / max(height, width))
            if stream is None:
                rate = fps or len(times) / (end - start)
                exact = Fraction(rate).limit_denominator(1001)
                size = _even(width * scale), _even(height * scale)
                stream = h264_stream(container, exact, size, "medium")
                stream.codec_context.time_base = _TICK
            pixels = np.ascontiguousarray(frame.permute(1, 2, 0).numpy())
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            small = picture.reformat(stream.width, stream.height, "yuv420p", interpolation="AREA")
            small.pts, small.time_base = round((moment - start) / _TICK), _TICK
            packets += stream.encode(small)
        if stream is not None:
            packets += stream.encode()
            stays = end - times[-1]
            packets[-1].duration = round(stays / (packets[-1].time_base or _TICK))
        container.mux(packets)
    return out.getvalue()


def _moments(video: Video, fps: float | None) -> list[float]:
    """When the frames of a smaller copy start; what is on screen first is so from 0."""
    if fps is not None:
        return [i / fps for i in range(int(video.info.last * fps + 1e-3) + 1)]
    return [0.0, *sorted({time for time in video.times if time > EPSILON})]


def _even(side: float) -> int:
    return max(2, round(side / 2) * 2)


def _check_clip(sample: Sample, members: dict[str, bytes]) -> None:
    """A real-time clip must be as long as its conversation."""
    for medium in sample.media:
        if medium.times:
            check_end(medium.times, probe_video(members[medium.file]))

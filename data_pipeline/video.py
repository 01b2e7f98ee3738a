"""Videos to frames, by time stamps: which moments, and the pictures shown at them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from data_pipeline.schema import SampleError

_EPSILON = 1e-4  # seconds: a frame stamped 0.99999 is the frame of second 1


@dataclass(frozen=True)
class VideoInfo:
    """Seconds from the first frame: when the last one starts, and when it ends."""

    last: float
    duration: float
    frames: int


def sample_times(info: VideoInfo, fps: float, min_frames: int, max_frames: int) -> list[float]:
    """The moments to show: every 1/fps s from 0, if that makes an allowed number of frames.

    Beyond the bounds, `min_frames` or `max_frames` moments spread evenly from the first frame to
    the last; a video with fewer frames than `min_frames` then repeats some.
    """
    natural = max(1, int(info.duration * fps + _EPSILON))
    count = min(max(natural, min_frames), max_frames)
    if count == natural:
        return [min(i / fps, info.last) for i in range(count)]
    if count == 1:
        return [0.0]
    return [info.last * i / (count - 1) for i in range(count)]


def probe_video(data: bytes) -> VideoInfo:
    """Reads the time stamps of all packets, decoding nothing.

    Raises SampleError: `undecodable_video`, `empty_video`, or `truncated_video` where the file
    ends well before the length that its header states.
    """
    with _open(data) as (container, stream):
        rate = float(stream.average_rate or 0)
        stated = float((stream.duration or 0) * (stream.time_base or 0))
        stamps = []
        for packet in container.demux(stream):
            stamp = packet.pts if packet.pts is not None else packet.dts
            if packet.size and stamp is not None and packet.time_base is not None:
                stamps.append(float(stamp * packet.time_base))
    if not stamps:
        raise SampleError("empty_video", f"{len(data)} bytes hold no frame")
    stamps.sort()
    gaps = [b - a for a, b in pairwise(stamps) if b > a]
    gap = median(gaps) if gaps else (1 / rate if rate else 0.0)
    last = stamps[-1] - stamps[0]
    if stated - (last + gap) > max(0.5, 0.1 * stated):
        raise SampleError(
            "truncated_video", f"the header says {stated:.2f} s, the data end at {last + gap:.2f} s"
        )
    return VideoInfo(last=last, duration=last + gap, frames=len(stamps))


def frames_at(data: bytes, times: Sequence[float]) -> Iterator[Tensor]:
    """Yields uint8 [3, H, W], upright, the frame shown at each of the rising `times` (seconds).

    Decodes up to the last moment asked for and no further. A moment after the last frame gets
    the last frame if it is less than a second late, else SampleError(`frame_after_end`).
    """
    due = list(times)
    previous: VideoFrame | None = None
    seen = 0.0
    with _open(data) as (container, stream):
        for now, frame in _clock(container, stream):
            while due and due[0] < now - _EPSILON:
                yield _pixels(previous or frame)
                due.pop(0)
            previous, seen = frame, now
            if not due:
                return
        for moment in due:
            if previous is None:
                raise SampleError("empty_video", f"{len(data)} bytes hold no frame")
            if moment >= seen + 1.0:
                raise SampleError(
                    "frame_after_end", f"no frame at {moment:.2f} s, the last is at {seen:.2f} s"
                )
            yield _pixels(previous)


def _clock(container: InputContainer, stream: VideoStream) -> Iterator[tuple[float, VideoFrame]]:
    """Decoded frames with their seconds since the first; counts where no time stamps exist."""
    rate = float(stream.average_rate or 25)
    first: float | None = None
    for index, frame in enumerate(container.decode(stream)):
        stamp = frame.time if frame.time is not None else index / rate
        first = stamp if first is None else first
        yield stamp - first, frame


@contextmanager
def _open(data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.video:
                raise SampleError("empty_video", "the file has no video stream")
            yield container, container.streams.video[0]
    except (av.FFmpegError, ValueError) as error:
        raise SampleError("undecodable_video", f"{len(data)} bytes: {error}") from None


def _pixels(frame: VideoFrame) -> Tensor:
    array = frame.to_ndarray(format="rgb24")  # [H, W, 3]
    turns = round(frame.rotation / 90) % 4  # phones store the picture lying and a matrix beside it
    array = np.rot90(array, turns)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))

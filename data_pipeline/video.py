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
from av.video.frame import VideoFrame
from torch import Tensor

from data_pipeline.packets import Packets
from data_pipeline.schema import SampleError

EPSILON = 1e-4  # seconds: a frame stamped 0.99999 is the frame of second 1
_LATE = 1.0  # seconds after the last frame's start at which there is nothing to show any more


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
    natural = max(1, int(info.duration * fps + EPSILON))
    count = min(max(natural, min_frames), max_frames)
    if count == natural:
        return [min(i / fps, info.last) for i in range(count)]
    if count == 1:
        return [0.0]
    return [info.last * i / (count - 1) for i in range(count)]


class Video:
    """A video whose time stamps are known and whose pictures are decoded on demand."""

    def __init__(self, packets: Packets, info: VideoInfo) -> None:
        self.info = info
        self._packets = packets

    def frames(self, times: Sequence[float]) -> Iterator[Tensor]:
        """Yields uint8 [3, H, W], upright, the frame on screen at each of the rising `times`.

        Times are seconds from the first frame. No more is decoded than they need. A moment after
        the last frame gets that frame if it is less than a second late, else there is a
        SampleError(`frame_after_end`) before any frame. Strides are those of [H, W, 3].
        """
        info = self.info
        if times and times[-1] >= info.last + _LATE:
            late = next(moment for moment in times if moment >= info.last + _LATE)
            raise SampleError(
                "frame_after_end", f"no frame at {late:.2f} s, the last is at {info.last:.2f} s"
            )
        shown, pixels = None, None
        for frame in self._packets.shown_at([moment + EPSILON for moment in times]):
            if pixels is None or frame is not shown:
                shown, pixels = frame, upright_pixels(frame)
            yield pixels


@contextmanager
def open_video(data: bytes, threads: int = 1) -> Iterator[Video]:
    """Opens a video file's bytes and reads all its packets, decoding nothing.

    `threads` decode it. Raises SampleError, from inside the context too: `undecodable_video`,
    `empty_video`, or `truncated_video` where the file ends well before the length that its header
    states.
    """
    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.video:
                raise SampleError("empty_video", "the file has no video stream")
            packets = Packets(container, container.streams.video[0], threads)
            if not packets.times:
                raise SampleError("empty_video", f"{len(data)} bytes hold no frame")
            yield Video(packets, _info(packets))
    except (av.FFmpegError, ValueError) as error:
        raise SampleError("undecodable_video", f"{len(data)} bytes: {error}") from None


def probe_video(data: bytes) -> VideoInfo:
    """The time stamps of a video file's bytes; the errors are those of open_video."""
    with open_video(data) as video:
        return video.info


def frames_at(data: bytes, times: Sequence[float], threads: int = 1) -> Iterator[Tensor]:
    """`Video.frames` of a video file's bytes."""
    with open_video(data, threads) as video:
        yield from video.frames(times)


def _info(packets: Packets) -> VideoInfo:
    times = packets.times
    gaps = [b - a for a, b in pairwise(times) if b > a]
    gap = median(gaps) if gaps else 1 / packets.rate
    last = times[-1]
    if packets.stated - (last + gap) > max(0.5, 0.1 * packets.stated):
        raise SampleError(
            "truncated_video",
            f"the header says {packets.stated:.2f} s, the data end at {last + gap:.2f} s",
        )
    return VideoInfo(last=last, duration=last + gap, frames=len(times))


def upright_pixels(frame: VideoFrame) -> Tensor:
    """uint8 [3, H, W], turned as its rotation says; strides are those of [H, W, 3]."""
    # One thread: starting one for each core and frame costs more than converting a small picture.
    array: np.ndarray = frame.to_ndarray(format="rgb24", threads=1)  # [H, W, 3]
    turns = round(frame.rotation / 90) % 4  # phones store the picture lying and a matrix beside it
    if turns:
        array = np.ascontiguousarray(np.rot90(array, turns))
    return torch.from_numpy(array).permute(2, 0, 1)

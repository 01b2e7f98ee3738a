"""Videos to frames: which moments to show (`sample_times`), and the pictures at these moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import av
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from data_pipeline.clock import EPSILON, Data, VideoError, open_container, read_track
from data_pipeline.packets import Packets
from data_pipeline.pixels import frame_pixels, shown_width
from data_pipeline.schema import SampleError

_LATE = 1.0  # seconds after the last frame's start at which it is shown in any case


@dataclass(frozen=True)
class VideoInfo:
    """Seconds of the file's clock: the starts of the first and last frames, the last one's end."""

    last: float
    duration: float
    frames: int
    first: float = 0.0


def sample_times(info: VideoInfo, fps: float, min_frames: int, max_frames: int) -> list[float]:
    """The moments to show: every 1/fps s from the first frame, if that makes an allowed number.

    Beyond the bounds, `min_frames` or `max_frames` moments spread evenly from the first frame to
    the last; a video with fewer frames than `min_frames` then repeats some. Seconds of the file's
    clock.
    """
    natural = max(1, int((info.duration - info.first) * fps + EPSILON))
    count = min(max(natural, min_frames), max_frames)
    if count == natural:
        return [info.first + i / fps for i in range(count)]
    step = (info.last - info.first) / max(count - 1, 1)
    return [info.first + step * i for i in range(count)]


class Video:
    """A video whose time stamps are known and whose pictures are decoded on demand."""

    def __init__(self, packets: Packets, info: VideoInfo) -> None:
        self.info = info
        self.times = packets.times  # seconds of the file's clock at which frames start, rising
        self._packets = packets

    def frames(self, times: Sequence[float]) -> Iterator[Tensor]:
        """Yields uint8 [3, H, W], upright, the frame on screen at each of the rising `times`.

        Times are seconds of the file's clock; before the first frame the first one is shown. No
        more is decoded than they need. A moment after the last frame has ended, and a second or
        more after it started, is a SampleError(`frame_after_end`) before any frame. Strides are
        those of [H, W, 3].
        """
        check_end(times, self.info)
        shown, pixels = None, None
        for frame in self._packets.shown_at(times):
            if pixels is None or frame is not shown:
                shown, pixels = frame, upright_pixels(frame, self._packets.stream)
            yield pixels


def check_end(times: Sequence[float], info: VideoInfo) -> None:
    """SampleError(`frame_after_end`) for a moment at which a video has nothing to show."""
    end = max(info.duration, info.last + _LATE)
    late = next((moment for moment in times if moment >= end), None)
    if late is not None:
        raise SampleError(
            "frame_after_end",
            f"no frame at {late:.2f} s, the last is at {info.last:.2f} s and ends at "
            f"{info.duration:.2f} s",
        )


# HEIC and AVIF, by their brand: FFmpeg takes each tile of such a picture for a video.
_STILLS = ("heic", "heix", "heim", "mif1", "avif")


@contextmanager
def open_video(
    data: Data, threads: int = 1, *, formats: str = "", max_pixels: int = 0
) -> Iterator[Video]:
    """Opens a video file's bytes and reads all its packets, decoding nothing.

    Args:
        threads: that decode it.
        formats: as in `open_container`.
        max_pixels: of a frame, wherever in the file it is; 0: no limit.

    Raises SampleError, from inside the context too: `undecodable_video`, `too_many_pixels`,
    `empty_video`, or `truncated_video` where the file ends before what its header states.
    """
    try:
        with open_container(data, formats) as container:
            brand = container.metadata.get("major_brand", "")
            if brand in _STILLS:
                words = f"{len(data)} bytes: a picture ({brand}): give it as one, as JPEG or PNG"
                raise SampleError("undecodable_video", words)
            if max_pixels:
                _limit_pixels(container, max_pixels)
            track = read_track(container, data)
            times = track.times
            info = VideoInfo(times[-1], track.end, len(times), times[0])
            yield Video(Packets(track, threads), info)
    except VideoError as error:
        raise SampleError(error.reason, error.detail) from None
    except (av.FFmpegError, ValueError) as error:
        raise SampleError("undecodable_video", f"{len(data)} bytes: {error}") from None


def _limit_pixels(container: InputContainer, most: int) -> None:
    """Refuses a file by its headers, and has its decoders refuse a frame that is larger."""
    for stream in container.streams.video:
        if stream.codec_context is None:
            continue  # there is no decoder for it
        width, height = stream.codec_context.width, stream.codec_context.height
        width = max(width, shown_width(width, stream))
        if width * height > most:
            raise SampleError("too_many_pixels", f"{width} x {height} pixels are more than {most}")
        stream.codec_context.options = {"max_pixels": str(most)}


def probe_video(data: bytes) -> VideoInfo:
    """The time stamps of a video file's bytes; the errors are those of open_video."""
    with open_video(data) as video:
        return video.info


def frames_at(data: bytes, times: Sequence[float], threads: int = 1) -> Iterator[Tensor]:
    """`Video.frames` of a video file's bytes."""
    with open_video(data, threads) as video:
        yield from video.frames(times)


def upright_pixels(frame: VideoFrame, stream: VideoStream) -> Tensor:
    """uint8 [3, H, W], as `frame_pixels` has them; strides are those of [H, W, 3]."""
    return torch.from_numpy(frame_pixels(frame, stream)).permute(2, 0, 1)

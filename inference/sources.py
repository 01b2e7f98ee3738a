"""Where frames come from: a video file, a picture, a camera, a stream on the network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
from torch import Tensor

from data_pipeline.clock import EPSILON
from data_pipeline.images import decode_image
from data_pipeline.schema import SampleError
from data_pipeline.video import open_video, sample_times, upright_pixels

_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}
# Of a whole video, by default; a real-time model watches more frames than another is shown.
CLIP_FPS, CLIP_MIN_FRAMES, CLIP_MAX_FRAMES, WATCHED_MAX_FRAMES = 1.0, 8, 16, 256
_TIMEOUT = "10000000"  # microseconds after which a network stream counts as dead


class SourceError(Exception):
    """A source that cannot be read; the message names it and says what to do."""


@dataclass(frozen=True)
class Source:
    """A video by its name on the command line: a path, the number of a camera, or a URL."""

    name: str

    @property
    def live(self) -> bool:
        """Whether its frames come at their own time: a camera or a stream on the network."""
        return self.name.isdigit() or "://" in self.name

    def check(self) -> None:
        """Raises SourceError for a file that is not there, before a model is loaded for it."""
        if not self.live and not Path(self.name).is_file():
            raise SourceError(f"{self.name}: there is no such file")

    def frames(self, fps: float) -> Iterator[tuple[float, Tensor]]:
        """(second, uint8 [3, H, W]) every 1/fps seconds of the source's own clock."""
        self.check()
        try:
            yield from self._stream(fps) if self.live else self._file(fps)
        except SampleError as error:
            raise SourceError(f"{self.name}: {error.reason}: {error.detail}") from None
        except (av.FFmpegError, OSError) as error:
            raise SourceError(f"{self.name}: cannot be read: {error}") from None

    def _file(self, fps: float) -> Iterator[tuple[float, Tensor]]:
        with open_video(Path(self.name).read_bytes()) as video:
            times = sample_times(video.info, fps, 1, sys.maxsize)
            yield from zip(times, video.frames(times), strict=True)

    def _stream(self, fps: float) -> Iterator[tuple[float, Tensor]]:
        with self._open() as container:
            if not container.streams.video:
                raise SourceError(f"{self.name}: has no video stream")
            first, due = None, 0.0
            for index, frame in enumerate(container.decode(container.streams.video[0])):
                stamp = frame.time if frame.time is not None else index / 25
                first = stamp if first is None else first
                if stamp - first + EPSILON >= due:
                    yield stamp - first, upright_pixels(frame)
                    due = (int((stamp - first + EPSILON) * fps) + 1) / fps

    def _open(self) -> av.container.InputContainer:
        if not self.name.isdigit():
            transport = {"rtsp_transport": "tcp"} if self.name.startswith("rtsp") else {}
            return av.open(self.name, options={"timeout": _TIMEOUT, **transport})
        if sys.platform not in _CAMERAS:
            raise SourceError(f"camera {self.name}: cameras are read on Linux and macOS only")
        form, device = _CAMERAS[sys.platform]
        return av.open(device.format(self.name), format=form)


def picture(path: str) -> Tensor:
    """A picture file, uint8 [3, H, W]; SourceError."""
    if not Path(path).is_file():
        raise SourceError(f"{path}: there is no such file")
    try:
        return decode_image(Path(path).read_bytes())
    except SampleError as error:
        raise SourceError(f"{path}: {error.reason}: {error.detail}") from None


def clip(path: str, fps: float, least: int, most: int) -> list[Tensor]:
    """Frames of a whole video at `fps`, from `least` to `most` of them; SourceError."""
    Source(path).check()
    try:
        return clip_frames(Path(path).read_bytes(), fps, least, most)
    except SampleError as error:
        raise SourceError(f"{path}: {error.reason}: {error.detail}") from None


def clip_frames(data: bytes, fps: float, least: int, most: int) -> list[Tensor]:
    """As `clip`, of a video file's bytes; SampleError."""
    with open_video(data) as video:
        return list(video.frames(sample_times(video.info, fps, least, most)))

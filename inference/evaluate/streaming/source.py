"""Reads frames of a video by its own seconds: as a stream, or as a clip."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_pipeline.files import read_bytes
from data_pipeline.video import Video, open_video

_CLOSE = 1e-6  # frames: rounding errors below it do not count as one more


@dataclass(frozen=True)
class Source:
    """An open video file."""

    video: Video

    @property
    def duration(self) -> float:
        """Where the last frame ends, in seconds of the file's clock."""
        return self.video.info.duration

    def second(self, second: float) -> float:
        """A second counted from the start; a negative `second` counts from the end."""
        return second if second >= 0 else max(0.0, self.duration + second)

    def stream(self, start: float, end: float | None, fps: float) -> Iterator[tuple[float, Tensor]]:
        """Yields (second, uint8 [3, H, W]) every 1/fps s from `start` to `end`, both included, but
        not beyond the end of the video."""
        times = self._times(start, end, fps, closed=True)
        yield from zip(times, self.video.frames(times), strict=True)

    def clip(self, start: float, end: float | None, fps: float, most: int) -> Iterator[Tensor]:
        """Yields uint8 [3, H, W] every 1/fps s from `start` up to `end`, at least one; where these
        are more than `most`, so many of them, spread evenly."""
        times = self._times(start, end, fps, closed=False)
        if len(times) > most:
            step = (len(times) - 1) / max(most - 1, 1)
            times = [times[round(i * step)] for i in range(most)]
        yield from self.video.frames(times)

    def _times(self, start: float, end: float | None, fps: float, closed: bool) -> list[float]:
        start = max(0.0, min(start, self.video.info.last))
        open_end = self.duration if end is None or end >= self.duration else end
        count = math.ceil((open_end - start) * fps - _CLOSE)
        if closed and open_end == end and math.isclose((end - start) * fps, count):
            count += 1  # the frame of `end` itself
        return [start + i / fps for i in range(max(1, count))]


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Opens a video. Raises SampleError where the file is missing, broken or not a video."""
    with open_video(read_bytes(str(path))) as video:
        yield Source(video)

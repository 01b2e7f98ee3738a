"""Frames of a source by its own seconds: a stream of them, or a clip."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_pipeline.files import read_bytes
from data_pipeline.video import Video, open_video

_CLOSE = 1e-6  # seconds


@dataclass(frozen=True)
class Source:
    """An open video file. `duration`: where its last frame ends, in seconds of its own clock."""

    video: Video

    @property
    def duration(self) -> float:
        return self.video.info.duration

    def second(self, second: float) -> float:
        """A second from the start; a negative one counts from the end."""
        return second if second >= 0 else max(0.0, self.duration + second)

    def stream(self, start: float, end: float | None, fps: float) -> Iterator[tuple[float, Tensor]]:
        """(second, uint8 [3, H, W]) every 1/fps s from `start` to `end`, both included, as long as
        there is something to show."""
        times = self._times(start, end, fps, closed=True)
        yield from zip(times, self.video.frames(times), strict=True)

    def clip(self, start: float, end: float | None, fps: float, most: int) -> Iterator[Tensor]:
        """uint8 [3, H, W] every 1/fps s from `start` up to `end`, one at least; of more than `most`
        as many, spread evenly."""
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
    """SampleError where the file is missing, broken or not a video."""
    with open_video(read_bytes(str(path))) as video:
        yield Source(video)

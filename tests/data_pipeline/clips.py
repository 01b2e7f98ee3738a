"""Video files whose clock is known: the table that every way into the model is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

HEIGHT, BAR, BITS = 32, 8, 8
_PLAIN = Disposition(0)
MILLISECOND = Fraction(1, 1000)


def picture(number: int) -> np.ndarray:
    """[HEIGHT, BITS * BAR, 3]: bar b is bright where bit b of the number is set."""
    bits = [220 if number >> bit & 1 else 30 for bit in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8), BAR)
    return np.tile(row[None, :, None], (HEIGHT, 1, 3))


def number(pixels: Any) -> int:
    """The number of a picture [H, W, 3]."""
    row = np.asarray(pixels).astype(float).mean(2)[HEIGHT // 2]
    return sum(1 << bit for bit in range(BITS) if row[bit * BAR + BAR // 2] > 125)


def video(
    path: Path,
    stamps: Sequence[float],
    *,
    first: int = 0,
    codec: str = "libx264",
    form: str | None = None,
    coding: dict[str, str] | None = None,
    sound: float = 0.0,
    stays: float = 0.0,
    tick: Fraction = MILLISECOND,
    cover: bool = False,
) -> Path:
    """Frame first + i is shown from stamps[i] seconds, the last one for `stays`.

    `sound`: seconds of silence from 0 on. `cover`: a red still as a track of its own before it.
    """
    gap = min((b - a for a, b in pairwise(stamps)), default=0.04)
    with av.open(str(path), "w", format=form) as out:
        packets = still(out) if cover else []
        stream: Any = out.add_stream(codec, rate=Fraction(gap).limit_denominator(1001) ** -1)
        stream.width, stream.height, stream.pix_fmt = BAR * BITS, HEIGHT, "yuv420p"
        stream.codec_context.time_base = tick
        stream.options = {"bf": "0", "g": "50", **(coding or {})}
        for i, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(picture(first + i), format="rgb24")
            frame.pts, frame.time_base = round(stamp / tick), tick
            packets += stream.encode(frame)
        packets += stream.encode()
        if stays:
            packets[-1].duration = round(stays / packets[-1].time_base)
        packets += silence(out, sound)
        for packet in sorted(packets, key=lambda p: float(p.dts * p.time_base)):
            out.mux(packet)
    return path


def silence(out: Any, seconds: float) -> list[Any]:
    if not seconds:
        return []
    track = out.add_stream("aac", rate=16000, layout="mono")
    packets = []
    for i in range(int(seconds * 16000) // 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate, frame.pts, frame.time_base = 16000, 1024 * i, Fraction(1, 16000)
        packets += track.encode(frame)
    return [*packets, *track.encode()]


def still(out: Any, disposition: Disposition = _PLAIN) -> list[Any]:
    track = out.add_stream("mjpeg", rate=25)
    track.width, track.height, track.pix_fmt = 16, 16, "yuvj420p"
    track.disposition = disposition
    frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), (255, 0, 0), np.uint8), format="rgb24")
    frame.pts = 0
    return [*track.encode(frame.reformat(format="yuvj420p")), *track.encode()]


def joined(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def animated(path: Path, lengths: list[int], **options: Any) -> Path:
    """GIF, WebP or PNG; `lengths`: milliseconds that each picture stays."""
    pictures = [Image.fromarray(picture(i)) for i in range(len(lengths))]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=lengths, loop=0, **options
    )
    return path


@dataclass(frozen=True)
class Clip:
    """How a file is made, which frame is on screen at which second, and when the last one ends."""

    name: str
    make: Callable[[Path], Path]
    frames: dict[float, int]
    end: float


def every(gap: float, count: int, start: float = 0.0) -> list[float]:
    return [start + gap * i for i in range(count)]


def _joined_ts(folder: Path, start: float) -> Path:
    """Two recordings of 4 s at 10 frames a second, the second one's clock starts at `start`."""
    tick = Fraction(1, 90000)
    parts = [
        video(folder / f"{i}.ts", every(0.1, 40, at), first=40 * i, form="mpegts", tick=tick)
        for i, at in enumerate((0.0, start))
    ]
    return joined(folder / "joined.ts", *parts)


def _without_stamps(folder: Path, rate: int) -> Path:
    """Coded pictures alone, whose container would say 25 frames a second."""
    stamps = every(1 / rate, 4 * rate)
    return video(folder / "a.h264", stamps, form="h264", tick=Fraction(1, rate))


WRAP = 2**33 / 90000  # seconds after which the clock of a transport stream starts again
LATE = {0.0: 0, 1.0: 0, 3.0: 0, 4.0: 10, 5.0: 20, 8.9: 59}
# The sound starts with what its codec is primed with: 1,024 values at 16 kHz.
LATE_TS = {0.0: 0, 1.0: 0, 3.1: 0, 4.1: 10, 5.1: 20, 9.0: 59}
PLAIN = {0.0: 0, 0.1: 1, 0.95: 9, 1.0: 10, 2.0: 20, 3.9: 39}
SLIDES = {0.0: 0, 2.9: 0, 3.0: 1, 5.9: 1, 6.0: 2, 11.5: 3}

CLIPS = [
    Clip("plain", lambda d: video(d / "a.mp4", every(0.1, 40)), PLAIN, 4.0),
    Clip("B frames", lambda d: video(d / "a.mp4", every(0.1, 40), coding={"bf": "2"}), PLAIN, 4.0),
    Clip("sound first, MP4", lambda d: video(d / "a.mp4", every(0.1, 60, 3), sound=9), LATE, 9.0),
    Clip("sound first, MKV", lambda d: video(d / "a.mkv", every(0.1, 60, 3), sound=9), LATE, 9.0),
    Clip("sound first, TS", lambda d: video(d / "a.ts", every(0.1, 60, 3), sound=9),
         LATE_TS, 9.064),
    Clip("late start, TS", lambda d: video(d / "a.ts", every(0.1, 40, 7)), PLAIN, 4.0),
    Clip("late start, WebM", lambda d: video(d / "a.webm", every(0.1, 40, 7), codec="libvpx"),
         PLAIN, 4.0),
    Clip("joined, clock back", lambda d: _joined_ts(d, 0), PLAIN | {4.0: 40, 5.0: 50, 7.9: 79}, 8),
    Clip("joined, hours ahead", lambda d: _joined_ts(d, 9000), PLAIN | {4.0: 40, 7.9: 79}, 8),
    Clip("wrapped clock", lambda d: video(d / "a.ts", every(0.1, 40, WRAP - 2)), PLAIN, 4.0),
    Clip("wrapped later", lambda d: video(d / "a.ts", every(1, 160, WRAP - 100)),
         {0.0: 0, 99.0: 99, 101.0: 101, 150.0: 150}, 160.0),
    Clip("bare, 10 a second", lambda d: _without_stamps(d, 10), PLAIN, 4.0),
    Clip("bare, 30 a second", lambda d: _without_stamps(d, 30), {0: 0, 1: 30, 2: 60, 3.5: 105}, 4),
    Clip("AVI", lambda d: video(d / "a.avi", every(0.1, 40), codec="mpeg4", tick=Fraction(1, 10)),
         PLAIN, 4.0),
    Clip("AVI, B frames", lambda d: video(d / "a.avi", every(0.1, 40), coding={"bf": "2"},
         tick=Fraction(1, 10)), PLAIN, 4.0),
    Clip("slides", lambda d: video(d / "a.mp4", every(3, 4), stays=3), SLIDES, 12.0),
    Clip("held last picture, MP4", lambda d: video(d / "a.mp4", every(0.1, 40), stays=60),
         PLAIN | {4.5: 39, 63.8: 39}, 63.9),
    Clip("held last picture, MKV", lambda d: video(d / "a.mkv", every(0.1, 40), stays=60),
         PLAIN | {4.5: 39, 63.8: 39}, 63.9),
    Clip("uneven", lambda d: video(d / "a.mp4", [0, 0.1, 0.2, 3.0, 3.1, 6.0], stays=0.5),
         {0.0: 0, 0.15: 1, 1.0: 2, 2.9: 2, 3.0: 3, 5.9: 4, 6.0: 5}, 6.5),
    Clip("cover first", lambda d: video(d / "a.mkv", every(0.1, 40), cover=True), PLAIN, 4.0),
    Clip("GIF", lambda d: animated(d / "a.gif", [500, 500, 3000]), {0: 0, 0.5: 1, 1: 2, 3.9: 2}, 4),
    Clip("animated PNG", lambda d: animated(d / "a.png", [500, 500, 3000]),
         {0: 0, 0.5: 1, 1: 2, 3.9: 2}, 4.0),
    Clip("animated WebP", lambda d: animated(d / "a.webp", [500, 500, 3000], lossless=True),
         {0: 0, 0.5: 1, 1: 2, 3.9: 2}, 4.0),
]  # fmt: skip

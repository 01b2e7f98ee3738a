"""The length of a video as its header states it, without reading the rest of the file.

The boxes of MP4 and MOV are walked here (ISO/IEC 14496-12, `moov` and in it `mvhd`): FFmpeg opens a
file in 6 ms, because it looks for its streams, too. Other containers are opened by FFmpeg.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import av

_BOXES = 64  # that are looked at before FFmpeg is asked


def stated_seconds(file: BinaryIO, size: int) -> float:
    """The length in seconds that the header states; 0: it states none. Raises av.FFmpegError for a
    file that is not a video."""
    for kind, start, end in _boxes(file, 0, size):
        if kind == b"moov":
            inner = next((box for box in _boxes(file, start, end) if box[0] == b"mvhd"), None)
            if inner is not None and (seconds := _duration(file, inner[1])):
                return seconds
    file.seek(0)
    with av.open(cast(Any, file), "r", options={"protocol_whitelist": "none"}) as container:
        return (container.duration or 0) / 1e6


def _boxes(file: BinaryIO, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields the kind, first byte and end of each box."""
    for _ in range(_BOXES):
        if at + 8 > end:
            return
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head[:8])
        start = at + 8
        if length == 1 and len(head) == 16:  # a longer number follows
            (length,) = struct.unpack(">Q", head[8:])
            start = at + 16
        length = length or end - at  # 0: up to the end
        if length < start - at or not kind.isalnum():
            return
        yield kind, start, min(at + length, end)
        at += length


def _duration(file: BinaryIO, at: int) -> float:
    file.seek(at)
    head = file.read(32)
    if len(head) < 32:
        return 0.0
    # After version and flags: times of creation and change, ticks a second, length in ticks.
    unit, ticks = (
        struct.unpack(">IQ", head[20:32]) if head[0] else struct.unpack(">II", head[12:20])
    )
    unknown = ticks in (2**32 - 1, 2**64 - 1)
    return 0.0 if unknown or not unit else ticks / unit

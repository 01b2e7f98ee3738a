"""The packets of a video stream, and how to decode only those that some moments need.

A frame can be decoded when everything since the last keyframe before it has been, except for the
frames that no other one refers to. So groups of packets without a wanted frame are left out, and in
the others the decoder skips unwanted frames without dependants.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from av.codec.context import ThreadType
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

# Decoders of FFmpeg's own that look at `skip_frame` before each packet.
_SKIPPING = {"h264", "hevc", "mpeg4"}


class _Missed(Exception):
    """A packet that should have become a frame has not."""


class Packets:
    """All packets of a stream in decoding order; holds the whole encoded stream in memory.

    times: seconds from the first frame at which each frame starts, rising. rate: frames a second
    (25 where unknown). stated: the length in the file's header in seconds (0 where unknown).
    Raises ValueError for a codec that nothing decodes.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, threads: int) -> None:
        if stream.codec_context is None:
            raise ValueError("there is no decoder for its codec")
        self._codec = stream.codec_context
        self._codec.thread_count = threads
        self._codec.thread_type = ThreadType.AUTO if threads > 1 else ThreadType.NONE
        self.rate = float(stream.average_rate or 0) or 25.0
        self.stated = float((stream.duration or 0) * (stream.time_base or 0))
        self._packets = [packet for packet in container.demux(stream) if packet.size]
        # What an edit list cuts off is decoded for the frames behind it, and not shown.
        shown = [packet for packet in self._packets if not packet.is_discard]
        self._stamps = _stamps(shown)
        # Two stamps alike, or none, leave open which packet becomes which frame.
        exact = {p.pts for p in shown}
        self._exact = None not in exact and len(exact) == len(shown)
        unit = float(stream.time_base or 0)
        first = self._stamps[0] if self._stamps else 0
        self.times = [(stamp - first) * unit for stamp in self._stamps]
        if not self.times:
            self.times = [i / self.rate for i in range(len(shown))]

    def shown_at(self, moments: Sequence[float]) -> Iterator[VideoFrame]:
        """The frame on screen at each of the rising moments (seconds from the first frame)."""
        given = 0
        if self._exact:
            wanted = [self._stamps[max(0, bisect_right(self.times, m) - 1)] for m in moments]
            try:
                for frame in self._pick(wanted):
                    yield frame
                    given += 1
                return
            except _Missed:
                pass
        yield from self._follow(moments[given:])

    def _pick(self, wanted: list[int]) -> Iterator[VideoFrame]:
        """The frames with these rising stamps, a frame again where a stamp is there again."""
        left = iter(wanted)
        due = next(left, None)
        for first, last in self._runs(set(wanted)):
            self._codec.flush_buffers()
            for frame in self._decode(self._packets[first : last + 1], set(wanted)):
                if due is None:
                    return
                if frame.pts is None or frame.pts > due:
                    raise _Missed
                while due is not None and frame.pts == due:
                    yield frame
                    due = next(left, None)
        if due is not None:
            raise _Missed

    def _runs(self, wanted: set[int]) -> list[tuple[int, int]]:
        """First and last packets of the runs to decode: from a keyframe to a wanted frame."""
        runs: list[tuple[int, int]] = []
        keys: list[tuple[int, int]] = []  # index and stamp of the keyframes so far
        for index, packet in enumerate(self._packets):
            stamp = packet.pts
            if packet.is_keyframe and stamp is not None:
                keys.append((index, stamp))
            if stamp not in wanted:
                continue
            # A frame behind a keyframe in the file and before it on screen needs the one before.
            first = next((i for i, key in reversed(keys) if key <= stamp), 0)
            if runs and first <= runs[-1][1]:
                runs[-1] = (min(first, runs[-1][0]), index)
            else:
                runs.append((first, index))
        return runs

    def _decode(self, packets: list[Packet], wanted: set[int]) -> Iterator[VideoFrame]:
        skipping = self._codec.name in _SKIPPING
        for packet in packets:
            if skipping:
                self._codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from self._codec.decode(packet)
        yield from self._codec.decode(None)

    def _follow(self, moments: Sequence[float]) -> Iterator[VideoFrame]:
        """As `shown_at`, by decoding everything up to the last moment and following the clock."""
        due = list(moments)
        previous: VideoFrame | None = None
        self._codec.flush_buffers()
        self._codec.skip_frame = "DEFAULT"
        for now, frame in self._clock():
            while due and due[0] < now:
                yield previous or frame
                due.pop(0)
            previous = frame
            if not due:
                break
        else:
            if previous is not None:
                yield from [previous] * len(due)

    def _clock(self) -> Iterator[tuple[float, VideoFrame]]:
        """All frames with their seconds since the first; counts where no time stamps exist."""
        first: float | None = None
        for index, frame in enumerate(self._decode_all()):
            stamp = frame.time if frame.time is not None else index / self.rate
            first = stamp if first is None else first
            yield stamp - first, frame

    def _decode_all(self) -> Iterator[VideoFrame]:
        for packet in self._packets:
            yield from self._codec.decode(packet)
        yield from self._codec.decode(None)


def _stamps(packets: Sequence[Packet]) -> list[int]:
    """Rising time stamps in the stream's unit, of the packets that have any."""
    found = [p.pts if p.pts is not None else p.dts for p in packets]
    return sorted(stamp for stamp in found if stamp is not None)

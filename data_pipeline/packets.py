"""The packets of a video stream: decodes only those that the wanted frames need.

A frame needs every packet since the last keyframe before it, except for frames that no other frame
refers to. So groups of packets without a wanted frame are left out, and in the other groups the
decoder skips unwanted frames without dependants.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from av.codec.context import ThreadType
from av.packet import Packet
from av.video.frame import VideoFrame

from data_pipeline.clock import EPSILON, Track, frames_on_screen

# Decoders of FFmpeg that read `skip_frame` before each packet.
_SKIPPING = {"h264", "hevc", "mpeg4"}


class _Missed(Exception):
    """A packet did not become the frame that it should."""


class Packets:
    """Decodes what some moments need of a track, whose whole encoded stream is in memory."""

    def __init__(self, track: Track, threads: int) -> None:
        self._track = track
        self.stream = track.stream
        self._codec = track.stream.codec_context
        self._codec.thread_count = threads
        self._codec.thread_type = ThreadType.AUTO if threads > 1 else ThreadType.NONE
        self._packets = track.packets
        self._stamps, self.times = track.stamps, track.times
        # With equal or missing stamps it is not known which packet becomes which frame.
        self._exact = track.stamped and len(set(self._stamps)) == len(self._stamps)

    def shown_at(self, moments: Sequence[float]) -> Iterator[VideoFrame]:
        """The frame on screen at each of the rising moments (seconds of the file's clock)."""
        count = 0
        if self._exact:
            chosen = [
                self._stamps[max(0, bisect_right(self.times, moment + EPSILON) - 1)]
                for moment in moments
            ]
            try:
                for frame in self._pick(chosen):
                    yield frame
                    count += 1
                return
            except _Missed:
                pass
        yield from self._follow(moments[count:])

    def _pick(self, chosen: list[int]) -> Iterator[VideoFrame]:
        """The frames with these rising stamps; a frame is repeated where its stamp is."""
        left, stamps = iter(chosen), set(chosen)
        following = next(left, None)
        for first, last in self._runs(stamps):
            self._codec.flush_buffers()
            for frame in self._decode(self._packets[first : last + 1], stamps):
                if following is None:
                    return
                if frame.pts is None or frame.pts > following:
                    raise _Missed
                while following is not None and frame.pts == following:
                    yield frame
                    following = next(left, None)
        if following is not None:
            raise _Missed

    def _runs(self, chosen: set[int]) -> list[tuple[int, int]]:
        """First and last packets of the runs to decode: from a keyframe to a chosen frame."""
        runs: list[tuple[int, int]] = []
        keys: list[tuple[int, int]] = []  # index and stamp of the keyframes so far
        for index, packet in enumerate(self._packets):
            stamp = packet.pts
            if packet.is_keyframe and stamp is not None:
                keys.append((index, stamp))
            if stamp not in chosen:
                continue
            # A frame after a keyframe in the file but before it on screen needs the previous one.
            first = next((i for i, key in reversed(keys) if key <= stamp), 0)
            if runs and first <= runs[-1][1]:
                runs[-1] = (min(first, runs[-1][0]), index)
            else:
                runs.append((first, index))
        return runs

    def _decode(self, packets: list[Packet], chosen: set[int]) -> Iterator[VideoFrame]:
        skipping = self._codec.name in _SKIPPING
        for packet in packets:
            if skipping:
                self._codec.skip_frame = "DEFAULT" if packet.pts in chosen else "NONREF"
            yield from self._codec.decode(packet)
        yield from self._codec.decode(None)

    def _follow(self, moments: Sequence[float]) -> Iterator[VideoFrame]:
        """As `shown_at`, by decoding everything up to the last moment and following the clock."""
        self._codec.flush_buffers()
        self._codec.skip_frame = "DEFAULT"
        yield from frames_on_screen(self._decode_all(), self._track, moments)

    def _decode_all(self) -> Iterator[VideoFrame]:
        for packet in self._packets:
            yield from self._codec.decode(packet)
        yield from self._codec.decode(None)

"""The clock of a video file: which picture is on screen at which second, and where the file ends.

Seconds are those that a player shows: they count from the file's start, which is that of its first
track. `inference/hf/clock_moss_video.py`, which exports carry along, is a copy of this file.
"""

from __future__ import annotations

import io
import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from statistics import median
from typing import Any

import av
from av.container import InputContainer
from av.format import Flags
from av.packet import Packet
from av.stream import Disposition
from PIL import Image

EPSILON = 1e-4  # seconds: a frame stamped 0.99999 is the frame of second 1
_OLD = 1.0  # seconds that a frame may be on screen in place of one that cannot be decoded
# As the ffmpeg command has it: time stamps that jump further ahead go on from where they were, in
# formats whose stamps are known to jump, and in all others.
_JUMP, _LONGEST_GAP = 10.0, 30 * 3600.0  # seconds
_SECONDS = 1_000_000  # of a container's own times
Data = bytes | mmap.mmap  # of a file


class VideoError(Exception):
    """A video that cannot be used; `reason` is `undecodable_video`, `empty_video`, ..."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Track:
    """The pictures of a video file, encoded, and when each is shown.

    packets: in decoding order. Where `stamped`, each has a time stamp of its own (`pts`, in
        `unit`s), which the frame that is decoded from it has, too; else frames must be counted.
    stamps: of the packets that are shown, rising. times: their seconds on the file's clock.
    end: the second at which the last frame is gone. rate: frames a second where nothing is stamped.
    """

    stream: Any
    packets: list[Packet]
    stamped: bool
    stamps: list[int]
    times: list[float]
    end: float
    unit: float
    zero: float  # seconds: the file's start in the stream's own stamps

    def second(self, frame: Any, index: int) -> float:
        """When a decoded frame is shown; `index`: how many have been decoded before it."""
        if self.stamped and frame.pts is not None:
            return float(frame.pts * self.unit - self.zero)
        return self.times[min(index, len(self.times) - 1)]

    def reached(self, frame: Any, second: float) -> float:
        """Up to which second the packets lie from which a frame of `second` was decoded.

        Later than `second` where frames are counted, and the decoder gave none for the first
        packets; unknown, and so infinite, without stamps of decoding.
        """
        if self.stamped and frame.pts is not None:
            return second
        return inf if frame.dts is None else max(second, frame.dts * self.unit - self.zero)


def open_container(data: Data, formats: str = "") -> InputContainer:
    """A video file's bytes for reading; an animated WebP, which FFmpeg does not know, as PNG.

    formats: names of FFmpeg's demuxers that may read it; empty: any. None of them opens other files
    or addresses, which playlists and scripts name.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and b"ANIM" in data[:64]:
        data = _webp_to_png(data)
    file = data if isinstance(data, mmap.mmap) else io.BytesIO(data)
    options = {"protocol_whitelist": "none"}
    if formats:
        options["format_whitelist"] = formats
    return av.open(file, "r", options=options)


def read_track(container: InputContainer, data: Data) -> Track:
    """Reads all packets of a file's best video track, decoding nothing.

    Raises VideoError: no video track, no picture, no decoder, the file has been cut off.
    """
    stream = best_stream(container)
    if stream is None and _extent(container.format.name, data) == "cut":
        raise VideoError("truncated_video", "the data end before what says which tracks there are")
    if stream is None:
        raise VideoError("empty_video", "the file has no video stream")
    if stream.codec_context is None:
        raise VideoError("undecodable_video", "there is no decoder for its codec")
    packets = [packet for packet in container.demux(stream) if packet.size]
    # What an edit list cuts off is decoded for the frames behind it, and not shown.
    shown = [packet for packet in packets if not packet.is_discard]
    if not shown:
        raise VideoError("empty_video", f"{len(data)} bytes hold no frame")
    unit = float(stream.time_base or 0)
    flags: Any = container.format.flags  # an integer in PyAV 18
    jumps = bool(getattr(flags, "value", flags) & Flags.ts_discont.value)
    _continue_stamps(packets, unit, _JUMP if jumps else _LONGEST_GAP)
    _fill_stamps(packets)
    found = [p.pts if p.pts is not None else p.dts for p in shown]
    stamps = sorted(stamp for stamp in found if stamp is not None)
    if len(stamps) < len(shown):
        stamps, times, zero = [], _counted(shown, stream, unit), 0.0
        gap = times[1] - times[0] if len(times) > 1 else 1 / _rate(stream)
    else:
        gaps = [(b - a) * unit for a, b in pairwise(stamps) if b > a]
        gap = median(gaps) if gaps else 1 / _rate(stream)
        zero = stamps[0] * unit - _late(container, shown, stamps[0] * unit, gap, jumps)
        times = [stamp * unit - zero for stamp in stamps]
    last = max(shown, key=lambda p: p.pts if p.pts is not None else p.dts or 0)
    # Encoders give each packet the length that their nominal rate has, however far apart they are.
    end = times[-1] + max((last.duration or 0) * unit, gap)
    end = max(end, _stated_end(container, stream, data, times[0], end) - zero)
    # AVI knows no times of showing: FFmpeg guesses them, wrongly where the order is another one.
    guessed = container.format.name == "avi" and stream.codec_context.has_b_frames
    stamped = bool(stamps) and not guessed and all(p.pts is not None for p in shown)
    return Track(stream, packets, stamped, stamps, times, end, unit, zero)


def best_stream(container: InputContainer) -> Any:
    """The track that players show: no cover; the default one, then the largest; None without."""
    tracks = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    return best if best in tracks else next(iter(tracks), None)


def _late(
    container: InputContainer, shown: Sequence[Packet], first: float, gap: float, jumps: bool
) -> float:
    """Seconds from the file's start to its first picture, whose own stamp is `first`."""
    starts = [
        float(s.start_time * s.time_base)
        for s in container.streams
        if s.type in ("video", "audio") and s.start_time is not None and s.time_base
        and not s.disposition & Disposition.attached_pic
    ]  # fmt: skip
    start = min(starts, default=first)
    if container.start_time is not None and len(starts) == len(container.streams):
        start = container.start_time / _SECONDS
    dts, base = shown[0].dts, shown[0].time_base
    if container.format.name == "avi" and dts is not None and base is not None:
        first = float(dts * base)  # times of showing are FFmpeg's guess
    # Less than a frame is rounding and the priming of a sound codec. A track that starts before
    # the file, or in a jumping format long after, belongs to another recording.
    late = first - start
    return 0.0 if late < min(gap, 0.1) or (jumps and late > _JUMP) else late


def _continue_stamps(packets: Sequence[Packet], unit: float, ahead: float) -> None:
    """Stamps that jump back, or further ahead than so many seconds, go on from where they were.

    As in joined recordings. Changes the packets.
    """
    # FFmpeg knows no decoding times of the first frames of H.264 and HEVC in Matroska.
    first = next((i for i, packet in enumerate(packets) if packet.dts is not None), 0)
    clocks = [None] * first + [p.dts if p.dts is not None else p.pts for p in packets[first:]]
    known = [clock for clock in clocks if clock is not None]
    steps = [b - a for a, b in pairwise(known) if b > a]
    if not steps or not unit:
        return
    gap = round(median(steps))
    # Decoding times rise; presentation times, where there are no others, go to and fro.
    exact = all(p.dts is not None for p in packets)
    back = max(2 * gap, 0.2 / unit) if exact else max(20 * gap, 1 / unit)
    offset, before = 0, None
    for packet, clock in zip(packets, clocks, strict=True):
        if clock is not None:
            step = clock + offset - before if before is not None else gap
            if step < -back or step * unit > max(ahead, 20 * gap * unit):
                offset += gap - step
            before = clock + offset
        if offset:
            packet.pts = packet.pts + offset if packet.pts is not None else None
            packet.dts = packet.dts + offset if packet.dts is not None else None


def _fill_stamps(packets: Sequence[Packet]) -> None:
    """Packets without a stamp get one between those of their neighbors, where some have one."""
    known = [(i, p.pts) for i, p in enumerate(packets) if p.pts is not None]
    values = [stamp for _, stamp in known]
    if not known or len(known) == len(packets) or values != sorted(values):
        return  # none, all, or frames that are stored in another order than shown
    steps = [(b - a) / (j - i) for (i, a), (j, b) in pairwise(known) if b > a]
    step = median(steps) if steps else float(packets[0].duration or 1)
    place = iter([*known[1:], None])
    (index, stamp), following = known[0], next(place)
    for i, packet in enumerate(packets):
        if following is not None and i == following[0]:
            (index, stamp), following = following, next(place)
        if packet.pts is not None:
            continue
        if following is not None and i > index:
            step = (following[1] - stamp) / (following[0] - index)
        packet.pts = round(stamp + (i - index) * step)


def _counted(shown: Sequence[Packet], stream: Any, unit: float) -> list[float]:
    """Seconds of frames without stamps: by their own lengths, else at the stream's rate."""
    lengths = [(packet.duration or 0) * unit for packet in shown]
    if not all(lengths):
        lengths = [1 / _rate(stream)] * len(shown)
    times, now = [], 0.0
    for length in lengths:
        times.append(now)
        now += length
    return times


def _rate(stream: Any) -> float:
    """Frames a second, as the coded pictures say it before the container's guess."""
    return float(stream.guessed_rate or stream.average_rate or 0) or 25.0


def _stated_end(
    container: InputContainer, stream: Any, data: Data, first: float, end: float
) -> float:
    """Where the header says that the pictures end, in the stream's own seconds; 0: it does not.

    A file that is whole may hold its last picture until then. VideoError for one that is not.
    """
    form = container.format.name
    state = _extent(form, data)
    if state == "joined":
        raise VideoError("undecodable_video", f"another file begins behind the first one's "
                         f"{end:.2f} s: join videos with ffmpeg's concat")  # fmt: skip
    length = (container.duration or 0) / _SECONDS
    own = float((stream.duration or 0) * (stream.time_base or 0))
    lengths = form.partition(",")[0] in ("mov", "matroska", "flv", "avi", "asf")
    if state == "cut" or (lengths and not state and own - (end - first) > max(0.5, 0.1 * own)):
        header_end = f"the header says {max(own, length):.2f} s, " if max(own, length) > end else ""
        raise VideoError("truncated_video", f"{header_end}the data end at {end:.2f} s")
    if state != "whole":
        return 0.0
    if own:
        return float((stream.start_time or 0) * (stream.time_base or 0)) + own
    clock = stream.metadata.get("DURATION", "")  # Matroska: of this track
    if clock:
        return sum(float(part) * 60**i for i, part in enumerate(reversed(clock.split(":"))))
    tracks = [s for s in container.streams if s.type in ("video", "audio")]
    return length if len(tracks) == 1 else 0.0


def _extent(form: str, data: Data) -> str:
    """Whether a file holds all that its structure states: "whole", "cut" or, unknown, ""; "joined"
    where it holds another one, which nobody reads."""
    name = form.partition(",")[0]
    readers = {"mov": _boxes, "matroska": _segment, "flv": _tags, "avi": _riff, "gif": _gif}
    reader = readers.get(name)
    try:
        return reader(data) if reader else ""
    except (IndexError, ValueError):
        return ""


def _boxes(data: Data) -> str:
    """MP4, MOV: boxes of a size and a name; fragments say nothing of how many there are."""
    at, kinds = 0, []
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        kinds.append(kind)
        if size == 0:  # up to the end
            break
        if size < 8:
            return ""
        at += size
        if at > len(data) and kind in (b"mdat", b"moof", b"moov"):
            return "cut"
    if kinds and kinds[-1] == b"moof":
        return "cut"
    if b"moof" not in kinds and min(kinds.count(b"moov"), kinds.count(b"mdat")) > 1:
        return "joined"  # `cat a.mp4 b.mp4`
    return "" if b"moof" in kinds else "whole"


def _segment(data: Data) -> str:
    """Matroska, WebM: an EBML header, then a segment of a stated or, live, an unknown size."""
    at = 4
    for last in (False, True):
        width = 9 - data[at].bit_length()
        size = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
        if last and size == (1 << 7 * width) - 1:
            return ""
        at += width + size
        if not last:
            if data[at : at + 4] != b"\x18\x53\x80\x67":
                return ""
            at += 4
    return "cut" if at > len(data) else "whole"


def _tags(data: Data) -> str:
    """FLV: tags of a stated size, each with a number behind it."""
    at = int.from_bytes(data[5:9], "big") + 4
    while at + 11 <= len(data):
        if data[at : at + 3] == b"FLV":
            return "joined"
        at += 15 + int.from_bytes(data[at + 1 : at + 4], "big")
    return "whole" if at == len(data) else "cut"


def _riff(data: Data) -> str:
    """AVI: one or more chunks of a stated size; 0: the recorder was killed."""
    at = 0
    while data[at : at + 4] == b"RIFF":
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if not size:
            return ""
        at += 8 + size + size % 2
    return "cut" if at > len(data) + 1 else "whole"


def _gif(data: Data) -> str:
    return "whole" if data[:].rstrip(b"\0").endswith(b";") else "cut"


def _webp_to_png(data: Data) -> bytes:
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        pictures, lengths = [], []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            pictures.append(image.convert("RGBA"))
            lengths.append(image.info.get("duration", 0) or 100)
    pictures[0].save(out, "PNG", save_all=True, append_images=pictures[1:], duration=lengths)
    return out.getvalue()


def frames_on_screen(
    frames: Iterator[Any], track: Track, moments: Sequence[float]
) -> Iterator[Any]:
    """The frame shown at each of the rising moments, before the first one the first.

    Raises VideoError where the frame of a moment, and those of the second before it, could not be
    decoded: an older one would be shown for it.

    frames: of all packets, in the order of showing.
    """
    moments_left, previous, began = list(moments), None, 0.0
    for index, frame in enumerate(frames):
        now = track.second(frame, index)
        while moments_left and moments_left[0] + EPSILON < now:
            if previous is not None:
                _check_age(began, moments_left[0], track)
            yield previous or frame
            moments_left.pop(0)
        previous, began = frame, track.reached(frame, now)
        if not moments_left:
            return
    for moment in moments_left if previous is not None else ():
        _check_age(began, moment, track)
        yield previous


def _check_age(began: float, moment: float, track: Track) -> None:
    """VideoError where a frame from more than a second after `began` should be on screen."""
    expected = track.times[max(0, bisect_right(track.times, moment + EPSILON) - 1)]
    if expected - began > _OLD:
        raise VideoError("undecodable_video", f"no frame between {began:.2f} s and {moment:.2f} s "
                         "can be decoded")  # fmt: skip

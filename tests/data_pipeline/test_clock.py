"""A second has one meaning: the table of clips through every way into the model."""

from __future__ import annotations

import json
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from av.stream import Disposition

from data_pipeline.build import BuildOptions, build_shards
from data_pipeline.clock import _fill_stamps, open_container, read_track
from data_pipeline.importers.media import MediaOptions
from data_pipeline.schema import SampleError
from data_pipeline.video import frames_at, probe_video, sample_times
from inference.hf.processing_moss_video import read_video
from inference.sources import FileSource, clip_frames
from tests.data_pipeline.clips import CLIPS, Clip, every, number, silence, still, video
from tests.samples import imported


def numbers(data: bytes, times: list[float]) -> list[int]:
    return [number(frame.permute(1, 2, 0)) for frame in frames_at(data, times)]


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)
def test_every_way_shows_the_same_frame_at_a_second(clip: Clip, tmp_path: Path) -> None:
    path = clip.make(tmp_path)
    data, times = path.read_bytes(), list(clip.frames)
    info = probe_video(data)
    assert info.duration == pytest.approx(clip.end, abs=0.02)
    assert numbers(data, times) == list(clip.frames.values())
    # A command, an API's clip and the processor of an export choose the same moments.
    moments = sample_times(info, 2, 1, 1000)
    wanted = numbers(data, moments)
    by_command = [
        (second, number(f.permute(1, 2, 0))) for second, f in FileSource(str(path)).frames(2)
    ]
    assert by_command == list(zip(moments, wanted, strict=True))
    by_server = [number(frame.permute(1, 2, 0)) for frame in clip_frames(data, 2, 1, 1000)]
    by_export = [number(image) for image in read_video(path, 2, 1, 1000)]
    assert by_server == by_export == wanted


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)
@pytest.mark.parametrize("side", [None, 48])
def test_the_importer_keeps_the_clock(clip: Clip, side: int | None, tmp_path: Path) -> None:
    """Also where it encodes the video anew."""
    path = clip.make(tmp_path)
    info = {"video_path": path.name, "time_info": list(clip.frames)}
    marks = "<video>." * len(clip.frames)
    more = ["[RealTime QA][PLACEHOLDER]"] * (len(clip.frames) - 1)
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": marks}]
    record = {"messages": turns, "videos": [f"[RealTime QA][INFO]{json.dumps(info)}", *more]}
    (tmp_path / "live.json").write_text(json.dumps([record]))
    options = BuildOptions(media=MediaOptions(max_side=side))
    assert build_shards(tmp_path / "live.json", tmp_path / "out", options).imported.total() == 1
    (sample,) = imported(tmp_path / "out").values()
    (medium,) = sample["media"]
    (stored,) = sample["members"].values()
    if side is None:
        assert stored == path.read_bytes()
    assert probe_video(stored).duration == pytest.approx(clip.end, abs=0.02)
    if side is None:
        assert numbers(stored, medium["times"]) == list(clip.frames.values())
        return
    shown = [frame.float().mean(0)[12] for frame in frames_at(stored, medium["times"])]
    bits = [[round(float(row[b * 6 + 3])) > 125 for b in range(8)] for row in shown]
    assert [sum(1 << b for b in range(8) if row[b]) for row in bits] == list(clip.frames.values())


FORMS: dict[str, dict[str, Any]] = {
    "mp4": {}, "mov": {}, "mkv": {}, "flv": {},
    "webm": {"codec": "libvpx"}, "avi": {"codec": "mpeg4", "tick": Fraction(1, 10)},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sound", [0.0, 7.0])
def test_half_a_file_is_refused_and_a_whole_one_taken(
    form: str, sound: float, tmp_path: Path
) -> None:
    """Also where the sound is longer than the pictures."""
    if form == "webm" and sound:
        pytest.skip("WebM holds no AAC")
    data = video(tmp_path / f"a.{form}", every(0.1, 60), sound=sound, **FORMS[form]).read_bytes()
    assert probe_video(data).duration == pytest.approx(6.0, abs=0.15)
    for share in (0.5, 0.98):
        with pytest.raises(SampleError) as caught:
            probe_video(data[: int(len(data) * share)])
        assert caught.value.reason in ("truncated_video", "undecodable_video")


@pytest.mark.parametrize("form", ["mp4", "mov", "flv"])
def test_a_file_behind_another_is_told(form: str, tmp_path: Path) -> None:
    """`cat a.mp4 b.mp4`: FFmpeg and players show the first one alone."""
    data = video(tmp_path / f"a.{form}", every(0.1, 60), **FORMS[form]).read_bytes()
    with pytest.raises(SampleError, match=r"another file begins behind the first one's 6\.00 s"):
        probe_video(data + data)


def test_a_live_stream_without_a_length_is_whole_wherever_it_ends(tmp_path: Path) -> None:
    path = video(tmp_path / "a.ts", every(0.1, 60))
    data = path.read_bytes()
    assert probe_video(data[: len(data) // 2 // 188 * 188]).frames > 10


def test_a_late_start_by_an_edit_list(tmp_path: Path) -> None:
    """The empty edit moves the pictures behind the sound, as their own stamps do elsewhere."""
    data = video(tmp_path / "a.mp4", every(0.1, 60, 3), sound=9).read_bytes()
    edit = data.index(b"elst")
    assert struct.unpack(">i", data[edit + 16 : edit + 20]) == (-1,)  # an empty edit
    assert probe_video(data).first == pytest.approx(3.0, abs=0.01)


def test_sound_with_a_cover_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        packets = still(out, Disposition.attached_pic) + silence(out, 1)
        out.mux(packets)
    with pytest.raises(SampleError) as caught:
        probe_video((tmp_path / "a.mp4").read_bytes())
    assert caught.value.reason == "empty_video"


@pytest.mark.parametrize("form", ["mkv", "mp4"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_frames_that_stay_for_seconds_are_no_jump_of_the_clock(
    tmp_path: Path, codec: str, form: str
) -> None:
    """A slide show with B-frames: of its first packets Matroska has no times of decoding."""
    stamps = [0, 2.052, 2.062, 2.102, 2.103, *every(2.0, 9, 4.0)]
    coding = {"bf": "3", "b_strategy": "0", "x265-params": "log-level=none:bframes=4"}
    data = video(tmp_path / f"a.{form}", stamps, codec=codec, coding=coding).read_bytes()
    with open_container(data) as file:
        assert read_track(file, data).times == pytest.approx(stamps, abs=0.001)
    assert numbers(data, [1.9, 2.06, 8.1, 13.0]) == [0, 1, 7, 9]


@pytest.mark.parametrize(
    ("stamps", "filled"),
    [
        ([0, None, 200, None, None, 500, None], [0, 100, 200, 300, 400, 500, 600]),
        ([None, 100, 200], [0, 100, 200]),
        ([0, 300, None, 200], [0, 300, None, 200]),  # stored in another order than shown
        ([None, None], [None, None]),
    ],
)
def test_packets_without_a_stamp_get_one_between_their_neighbors(stamps, filled) -> None:
    packets = [av.Packet(1) for _ in stamps]
    for packet, stamp in zip(packets, stamps, strict=True):
        packet.pts = stamp
    _fill_stamps(packets)
    assert [packet.pts for packet in packets] == filled


def test_where_frames_are_counted_the_first_may_be_missing(
    tmp_path: Path,
) -> None:
    """AVI with B-frames, of a recording that begins between two keyframes."""
    whole, begun = tmp_path / "a.avi", tmp_path / "begun.avi"
    video(whole, every(0.2, 120), coding={"bf": "2", "g": "30"}, tick=Fraction(1, 5))
    with av.open(str(whole)) as source, av.open(str(begun), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in [*source.demux(video=0)][10:-1]:
            packet.stream = stream
            out.mux(packet)
    data = begun.read_bytes()
    with open_container(data) as file:
        track = read_track(file, data)
        assert not track.stamped
    last = track.times[-1]
    first, newest = numbers(data, [0.0, last])
    assert first >= 10
    assert newest == 119
    assert number(read_video(begun, 1, 1, 99)[-1]) > 110

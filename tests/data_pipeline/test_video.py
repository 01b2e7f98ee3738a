from __future__ import annotations

import io
import random
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, features

from data_pipeline.clock import read_track
from data_pipeline.packets import Packets
from data_pipeline.schema import SampleError
from data_pipeline.video import VideoInfo, frames_at, open_video, probe_video, sample_times
from inference.hf.processing_moss_video import read_video
from tests.data_pipeline import clips


def make_video(
    stamps: list[float],
    container: str = "mp4",
    codec: str = "libx264",
    file: Path | None = None,
    coding: dict[str, str] | None = None,
    step: int = 8,
    **options: str,
) -> bytes:
    """Frame i is a 32 x 48 picture of brightness `step` i, shown from stamps[i] seconds.

    `coding` are the encoder's options, `options` the container's.
    """
    out = io.BytesIO()
    target = str(file) if file else out  # some options need a file to go back in
    with av.open(target, "w", format=container, options=options) as video:
        stream: Any = video.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = coding or {}
        for i, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), step * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = round(stamp * 1000), Fraction(1, 1000)
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    return file.read_bytes() if file else out.getvalue()


def shown(data: bytes, times: list[float]) -> list[int]:
    return [round(frame.float().mean().item() / 8) for frame in frames_at(data, times)]


def test_times_are_on_the_clock_within_the_bounds() -> None:
    info = VideoInfo(last=9.9, duration=10.0, frames=100)
    assert sample_times(info, 1, 8, 256) == [float(i) for i in range(10)]
    assert sample_times(info, 0.5, 3, 64) == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_times_are_spread_evenly_beyond_the_bounds() -> None:
    info = VideoInfo(last=9.0, duration=10.0, frames=10)
    assert sample_times(info, 2, 2, 4) == [0.0, 3.0, 6.0, 9.0]
    assert sample_times(info, 0.2, 4, 8) == [0.0, 3.0, 6.0, 9.0]
    assert sample_times(info, 2, 1, 1) == [0.0]


def test_the_frame_on_screen_at_a_moment_is_taken() -> None:
    data = make_video([i / 10 for i in range(20)])
    info = probe_video(data)
    assert (info.frames, round(info.last, 3), round(info.duration, 3)) == (20, 1.9, 2.0)
    assert shown(data, [0.0, 0.1, 0.95, 1.0, 1.9, 1.9, 2.5]) == [0, 1, 9, 10, 19, 19, 19]
    assert next(iter(frames_at(data, [0.0]))).shape == (3, 32, 48)


def test_a_variable_frame_rate_is_followed_by_time_stamps() -> None:
    data = make_video([0.0, 0.1, 0.2, 3.0, 3.1, 6.0])
    assert shown(data, [0.0, 1.0, 2.9, 3.0, 4.0, 5.9, 6.0]) == [0, 2, 2, 3, 4, 4, 5]


@pytest.mark.parametrize(("container", "codec"), [("avi", "mpeg4"), ("matroska", "libx264")])
def test_other_containers(container: str, codec: str) -> None:
    data = make_video([i / 25 for i in range(25)], container, codec)
    assert probe_video(data).last == pytest.approx(24 / 25, abs=0.01)
    assert shown(data, [0.0, 0.4, 0.8]) == [0, 10, 20]


def test_avi_without_time_stamps_on_its_packets() -> None:
    """B frames in AVI: it stores no presentation times, so that frames must be counted."""
    data = make_video([i / 25 for i in range(25)], "avi", coding={"bf": "2"})
    assert shown(data, [0.0, 0.2, 0.4, 0.8]) == [0, 5, 10, 20]


def test_a_bare_stream_has_its_rate_only() -> None:
    data = make_video([i / 25 for i in range(30)], "h264")
    info = probe_video(data)
    assert (info.frames, round(info.duration, 2)) == (30, 1.2)
    assert shown(data, [0.0, 0.4, 1.0]) == [0, 10, 25]


@pytest.mark.parametrize("container", ["matroska", "mpegts"])
def test_a_live_stream_states_no_duration(container: str) -> None:
    """Nor does it start at zero: the first frame is second 0."""
    stamps = [7.0 + i / 10 for i in range(20)]
    if container == "matroska":
        data = make_video(stamps, container, live="1")
    else:
        data = make_video(stamps, container)
    with av.open(io.BytesIO(data)) as opened:
        assert opened.streams.video[0].duration is None or container == "mpegts"
    assert probe_video(data).last == pytest.approx(1.9, abs=0.01)
    assert shown(data, [0.0, 1.0, 1.9, 2.5]) == [0, 10, 19, 19]


def test_pictures_that_end_before_the_sound(tmp_path: Path) -> None:
    """Two seconds of pictures in five of sound: the pictures' length counts."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        video: Any = file.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        sound: Any = file.add_stream("aac", rate=8000, layout="mono")
        for i in range(20):
            pixels = np.full((32, 48, 3), 8 * i, np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(video.encode())
        for i in range(40):
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            noise.rate, noise.pts = 8000, 1024 * i
            file.mux(sound.encode(noise))
        file.mux(sound.encode())
    data = path.read_bytes()
    assert probe_video(data).duration == pytest.approx(2.0, abs=0.01)
    assert shown(data, [0.0, 1.0, 2.5]) == [0, 10, 19]
    with pytest.raises(SampleError, match=r"no frame at 3.00 s, the last is at 1.90 s"):
        shown(data, [0.0, 3.0])


# What the ISO file format calls the matrix of a track: a, b, u, c, d, v, x, y, w.
TURNS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
# Mirrored left to right, upside down, at either diagonal: where the corner at the top left goes.
MIRRORED = [((-1, 0, 0, 1), 90), ((1, 0, 0, -1), 270), ((0, 1, 1, 0), 0), ((0, -1, -1, 0), 180)]


@pytest.mark.parametrize(("matrix", "degrees"), [*((m, t) for t, m in TURNS.items()), *MIRRORED])
def test_a_phones_video_comes_out_upright(tmp_path: Path, matrix: Any, degrees: int) -> None:
    """The file asks to be shown turned by so many degrees clockwise, or mirrored."""
    path = tmp_path / "a.mp4"
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = 255  # the corner at the top left
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(stream.encode())
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    place = data.index(b"tkhd") + 4 + 40  # behind version, times, id, duration, layer, volume
    assert data[place : place + 4] == struct.pack(">i", 1 << 16)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (frame,) = frames_at(bytes(data), [0.0])
    assert frame.shape == ((3, 32, 64) if a else (3, 64, 32))
    height, width = frame.shape[1] // 2, frame.shape[2] // 2
    corners = {  # clockwise from the top left
        0: frame[:, :height, :width], 90: frame[:, :height, width:],
        180: frame[:, height:, width:], 270: frame[:, height:, :width],
    }  # fmt: skip
    bright = {turn: corner.float().mean().item() > 128 for turn, corner in corners.items()}
    assert bright == {turn: turn == degrees for turn in corners}


def every_frame(data: bytes) -> list[tuple[float, int]]:
    """Seconds and sum of the values of all frames, by the decoder alone."""
    with av.open(io.BytesIO(data), "r") as file:
        return [
            (float(frame.time or 0), int(frame.to_ndarray(format="rgb24").sum()))
            for frame in file.decode(video=0)
        ]


CODINGS = {
    "short groups": ("libx264", {"g": "10", "bf": "3", "sc_threshold": "0"}),
    "open groups": ("libx264", {"x264-params": "keyint=12:bframes=3:open-gop=1:scenecut=0"}),
    "one group": ("libx264", {"g": "1000", "bf": "2", "sc_threshold": "0"}),
    "vp9": ("libvpx-vp9", {"g": "10", "lag-in-frames": "8", "auto-alt-ref": "1"}),
    "mpeg4": ("mpeg4", {"g": "10", "bf": "2"}),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CODINGS)
def test_what_is_left_out_changes_no_picture(name: str, threads: int) -> None:
    codec, coding = CODINGS[name]
    container = "webm" if name == "vp9" else "mp4"
    data = make_video([i / 10 for i in range(60)], container, codec, coding=coding, step=4)
    clock = every_frame(data)
    chance = random.Random(name)
    for count in (1, 2, 5, 30):
        times = sorted(chance.uniform(0, 6.2) for _ in range(count))
        expected = [max(f for f in clock if f[0] <= moment + 1e-4)[1] for moment in times]
        found = [int(frame.sum()) for frame in frames_at(data, times, threads)]
        assert found == expected


def test_only_the_groups_that_are_needed_are_decoded() -> None:
    coding = {"g": "10", "bf": "0", "sc_threshold": "0"}
    data = make_video([i / 10 for i in range(60)], coding=coding, step=4)
    with av.open(io.BytesIO(data), "r") as file:
        packets = Packets(read_track(file, data), threads=1)
    unit = packets._stamps[1] - packets._stamps[0]
    assert packets._runs({3 * unit, 7 * unit, 35 * unit}) == [(0, 7), (30, 35)]


def test_a_video_can_be_asked_twice() -> None:
    with open_video(make_video([i / 10 for i in range(30)])) as video:
        for times in ([0.5, 1.5], [2.0], [0.0, 0.1]):
            found = [round(frame.float().mean().item() / 8) for frame in video.frames(times)]
            assert found == [round(moment * 10) for moment in times]


def test_a_moment_after_the_end_is_refused() -> None:
    with pytest.raises(SampleError, match=r"no frame at 4.00 s, the last is at 1.90 s") as caught:
        shown(make_video([i / 10 for i in range(20)]), [0.0, 4.0])
    assert caught.value.reason == "frame_after_end"


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    stamps = [i / 10 for i in range(30)]
    data = make_video(stamps)
    with pytest.raises(SampleError) as caught:
        probe_video(data[: len(data) // 2])
    assert caught.value.reason == "undecodable_video"  # its table of contents is at the end
    data = make_video(stamps, file=tmp_path / "a.mp4", movflags="faststart")
    with pytest.raises(SampleError) as caught:
        probe_video(data[: int(len(data) * 0.75)])
    assert caught.value.reason == "truncated_video"


def test_sound_alone_is_refused() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="wav") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(SampleError) as caught:
        probe_video(out.getvalue())
    assert caught.value.reason == "empty_video"


def test_real_clips(real_files: Path) -> None:
    expected = {
        "realtime_clip.mp4": (10, (3, 1280, 720)),
        "reading_baby.mp4": (9, (3, 360, 640)),
        "cooking.avi": (9, (3, 240, 320)),
    }
    for name, (count, shape) in expected.items():
        data = (real_files / name).read_bytes()
        times = sample_times(probe_video(data), 1, 8, 256)
        frames = list(frames_at(data, times))
        assert (len(frames), tuple(frames[0].shape)) == (count, shape)


def test_a_file_cut_off_in_its_table_of_contents_is_not_said_to_have_no_video() -> None:
    data = make_video([i / 10 for i in range(30)])
    with pytest.raises(SampleError, match="truncated_video"):
        probe_video(data[: data.index(b"moov") + 200])


@pytest.mark.parametrize(("sar", "width"), [("2/1", 128), ("8/11", 47), ("1/1", 64)])
def test_pixels_that_are_not_square_are_shown_as_wide_as_by_players(
    tmp_path: Path, sar: str, width: int
) -> None:
    coding = {"x264-params": f"sar={sar}"}
    data = clips.video(tmp_path / "a.mp4", [0, 1, 2], first=5, coding=coding).read_bytes()
    frames = [*frames_at(data, [0.0, 2.0])]
    places = [int((8 * bit + 4) * width / 64) for bit in range(8)]
    for number, frame in zip((5, 7), frames, strict=True):
        assert frame.shape == (3, 32, width)
        bright = frame.float().mean(0)[16, places] > 125
        assert sum(1 << bit for bit in range(8) if bright[bit]) == number
    assert [image.size for image in read_video(data, 1.0, 1, 9)] == [(width, 32)] * 3
    limit = 32 * 64
    with open_video(data, max_pixels=max(limit, 32 * width)) as video:
        assert video.info.frames == 3
    if width > 64:
        with (
            pytest.raises(SampleError, match="too_many_pixels: 128 x 32 pixels"),
            open_video(data, max_pixels=limit),
        ):
            pass


def test_frames_that_a_decoder_drops_are_not_replaced_by_old_ones(tmp_path: Path) -> None:
    """FFmpeg takes this shape of the pixels for an error, and may give the first frame alone."""
    coding = {"x264-params": "sar=99/1"}
    path = clips.video(tmp_path / "a.mp4", [i / 5 for i in range(25)], coding=coding)
    data = path.read_bytes()
    whole = clips.video(tmp_path / "b.mp4", [i / 5 for i in range(25)]).read_bytes()
    right = [clips.number(frame.permute(1, 2, 0)) for frame in frames_at(whole, [0.0, 2.0, 4.0])]
    with av.open(str(path)) as file:
        dropped = sum(1 for _ in file.decode(video=0)) < 25
    if dropped:
        with pytest.raises(SampleError, match=r"undecodable_video: no frame between 0\.00 s and 2"):
            list(frames_at(data, [0.0, 2.0, 4.0]))
        with pytest.raises(ValueError, match=r"no frame between 0\.00 s and 1"):
            read_video(data, 5.0, 1, 99)
    else:
        found = [clips.number(frame.permute(1, 2, 0)) for frame in frames_at(data, [0.0, 2.0, 4.0])]
        assert found == right


def test_a_still_picture_in_a_videos_container_is_not_a_video() -> None:
    """FFmpeg opens it, and of a large one shows a single tile. A moving one is a video."""
    if not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    red, blue = (Image.new("RGB", (64, 64), name) for name in ("red", "blue"))
    still, moving = io.BytesIO(), io.BytesIO()
    red.save(still, "AVIF")
    red.save(moving, "AVIF", save_all=True, append_images=[blue], duration=1000)
    with pytest.raises(SampleError, match=r"undecodable_video: .*a picture \(avif\)"):
        probe_video(still.getvalue())
    with open_video(moving.getvalue()) as video:
        first, second = video.frames([0.0, 1.0])
    assert first.float().mean((1, 2)).argmax() == 0
    assert second.float().mean((1, 2)).argmax() == 2

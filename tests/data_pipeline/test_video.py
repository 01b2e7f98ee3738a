from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data_pipeline.schema import SampleError
from data_pipeline.video import VideoInfo, frames_at, probe_video, sample_times


def make_video(
    stamps: list[float],
    container: str = "mp4",
    codec: str = "libx264",
    file: Path | None = None,
    **options: str,
) -> bytes:
    """Frame i is a 32 x 48 picture of brightness 8 i, shown from stamps[i] seconds."""
    out = io.BytesIO()
    target = str(file) if file else out  # some options need a file to go back in
    with av.open(target, "w", format=container, options=options) as video:
        stream: Any = video.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 8 * i, np.uint8), "rgb24")
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

"""Live sources on real sockets: their seconds, and that they are connected to again."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from inference.live import LiveSource, Notice, SourceError
from inference.sources import FileSource, open_source
from tests.data_pipeline.clips import every, number, video
from tests.inference.cameras import HEAD, camera, jpegs, transport_stream

LATE = 0.25  # seconds: how late a thread may run on a busy machine


class Watched:
    """What a source gives within some seconds, to somebody who waits for each frame's time."""

    def __init__(self, url: str, seconds: float, fps: float, reconnect: float = 60.0) -> None:
        self.frames: list[tuple[float, float]] = []  # second told, real second since the first
        self.notices: list[Notice] = []
        self.error = ""
        source = open_source(url, reconnect)
        assert isinstance(source, LiveSource)
        began, end = 0.0, threading.Event()
        try:
            for item in source.frames(fps, end.wait):
                now = time.monotonic()
                began = began or now
                if isinstance(item, Notice):
                    self.notices.append(item)
                else:
                    self.frames.append((item[0], now - began))
                    time.sleep(max(0.0, began + item[0] - time.monotonic()))
                if now - began > seconds:
                    break
        except SourceError as error:
            self.error = str(error)
        source.close()

    def named(self, type: str) -> list[Notice]:
        return [notice for notice in self.notices if notice.type == type]


@pytest.mark.parametrize("rate", [5, 40])
def test_a_camera_without_stamps_has_the_seconds_of_the_clock(rate: int) -> None:
    """FFmpeg stamps 25 a second, whatever comes."""
    with camera(jpegs(rate, 10)) as url:
        watched = Watched(url, 1.6, fps=2)
    assert len(watched.frames) >= 4
    for second, real in watched.frames:
        assert second == pytest.approx(real, abs=LATE)
    assert [second for second, _ in watched.frames][:4] == pytest.approx([0, 0.5, 1, 1.5], abs=LATE)
    assert not watched.notices


@pytest.mark.parametrize("restart", [0.0, 37600.0])
def test_a_stream_whose_clock_jumps_is_not_waited_for(restart: float) -> None:
    def serve(_number: int, client: socket.socket) -> None:
        client.sendall(HEAD % b"video/mp2t" + transport_stream(10, 15))
        time.sleep(1.5)
        client.sendall(transport_stream(restart, 10))
        time.sleep(1.0)

    with camera(serve) as url:
        watched = Watched(url, 1.9, fps=5)
    (jump,) = watched.named("source.clock")
    assert jump.data["jump_s"] == pytest.approx(restart - 11.4, abs=0.2)
    seconds = [second for second, _ in watched.frames]
    assert seconds == sorted(seconds)
    assert seconds[:7] == pytest.approx([i / 5 for i in range(7)])  # a burst has its own stamps
    last = watched.frames[-1]
    assert last[0] == pytest.approx(last[1], abs=LATE)


def test_a_camera_that_comes_back_is_seen_again_and_the_seconds_go_on() -> None:
    with camera(jpegs(10, 0.6), down=(1, 0.8)) as url:
        watched = Watched(url, 2.5, fps=5)
    lost, back = watched.named("source.lost"), watched.named("source.back")
    assert [notice.data["attempt"] for notice in lost][:2] == [1, 2]
    assert "Connection refused" in lost[1].data["message"]
    assert back[0].data["lost_s"] == pytest.approx(0.5 + 1.0, abs=0.5)
    seconds = [second for second, _ in watched.frames]
    assert seconds == sorted(set(seconds))
    assert seconds[-1] > back[0].data["frame_at"] - 0.01 > 1
    for second, real in watched.frames:
        assert second == pytest.approx(real, abs=LATE)


@pytest.mark.parametrize("reconnect", [0.0, 0.3])
def test_a_camera_that_stays_away_is_given_up(reconnect: float) -> None:
    with camera(jpegs(10, 0.4), down=(1, 9)) as url:
        watched = Watched(url, 9, 5, reconnect)
        tries = [notice.data["attempt"] for notice in watched.named("source.lost")]
        assert tries == ([] if reconnect == 0 else [1])
        assert watched.error.startswith(f"{url}: cannot be read: ")


def test_a_server_that_is_not_ready_is_asked_again_and_a_wrong_one_is_not() -> None:
    def serve(number: int, client: socket.socket) -> None:
        if number == 1:
            client.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        elif number == 2:
            jpegs(10, 1)(number, client)
        else:
            client.sendall(b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    said: list[str] = []
    with camera(serve) as url:
        open_source(url, 5.0, said.append).close()  # type: ignore[union-attr]
        assert len(said) == 1
        assert "503 Service Unavailable" in said[0] or "5XX" in said[0]
        with pytest.raises(SourceError, match="404 Not Found"):
            open_source(url, 5.0, said.append)
    assert len(said) == 1


def test_what_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="camera 77: cannot be read"):
        open_source("77")
    with pytest.raises(SourceError, match="Connection refused"):
        open_source("http://127.0.0.1:1/x")
    half = video(tmp_path / "a.mkv", every(0.1, 40)).read_bytes()
    (tmp_path / "half.mkv").write_bytes(half[: len(half) // 2])
    with pytest.raises(SourceError, match=r"half.mkv: truncated_video"):
        open_source(str(tmp_path / "half.mkv"))


def test_a_file_by_its_url_is_a_file(tmp_path: Path) -> None:
    """Served with its length, it has a file's clock: sound first, a last picture that stays."""
    path = video(tmp_path / "a.mp4", every(0.5, 6, 2), sound=5, stays=2)
    data = path.read_bytes()

    def serve(_number: int, client: socket.socket) -> None:
        head = b"HTTP/1.0 200 OK\r\nContent-Type: video/mp4\r\nContent-Length: %d\r\n\r\n"
        client.sendall(head % len(data) + data)

    with camera(serve) as url:
        fetched = open_source(url)
    assert isinstance(fetched, FileSource)
    local = open_source(path.as_uri())
    assert isinstance(local, FileSource)
    for source in (fetched, local):
        shown = [(second, number(frame.permute(1, 2, 0))) for second, frame in source.frames(1)]
        assert shown == [(2, 0), (3, 2), (4, 4), (5, 5)]

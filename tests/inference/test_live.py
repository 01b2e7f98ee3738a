"""Live sources on real sockets: their seconds, and that they are connected to again."""

from __future__ import annotations

import io
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import av
import pytest

from data_pipeline.stores import without_secrets
from inference import live
from inference.live import LiveSource, Notice, SourceError
from inference.sources import FileSource, open_source
from tests.data_pipeline.clips import every, number, video
from tests.inference.cameras import HEAD, camera, jpegs, rtsp, still, transport_stream
from tests.waiting import until


class Clock:
    """The clock of the source in a test: it goes when it is read, and when something is waited for.

    step: seconds by which it goes after each reading.
    """

    def __init__(self, step: float = 0.0) -> None:
        self.step, self.now, self.last = step, 100.0, 0.0
        self.readings, self._lock = 0, threading.Lock()

    def monotonic(self) -> float:
        with self._lock:
            self.last, self.readings = self.now, self.readings + 1
            self.now += self.step
            return self.last

    def pause(self, seconds: float) -> bool:
        """What is waited for takes no time here; nobody has gone."""
        with self._lock:
            self.now += seconds
        return False


class Watched:
    """What a source gives: until it is given up, or `most` frames."""

    def __init__(
        self,
        url: str,
        fps: float,
        clock: Clock,
        reconnect: float = 0.0,
        most: int = 1000,
        noticed: Callable[[Notice], None] = lambda notice: None,
    ) -> None:
        self.frames: list[tuple[float, float]] = []  # second told; clock since the first
        self.notices: list[Notice] = []
        self.error = ""
        source = open_source(url, reconnect)
        assert isinstance(source, LiveSource)
        began: float | None = None
        try:
            for item in source.frames(fps, clock.pause):
                if isinstance(item, Notice):
                    self.notices.append(item)
                    noticed(item)
                    continue
                began = clock.last if began is None else began
                self.frames.append((item[0], clock.last - began))
                if len(self.frames) == most:
                    break
        except SourceError as error:
            self.error = str(error)
        source.close()

    @property
    def seconds(self) -> list[float]:
        return [second for second, _ in self.frames]

    def named(self, type: str) -> list[Notice]:
        return [notice for notice in self.notices if notice.type == type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(live, "time", made)
    return made


@pytest.mark.parametrize("rate", [5, 40])
def test_a_camera_without_stamps_has_the_seconds_of_the_clock(clock: Clock, rate: int) -> None:
    """FFmpeg stamps 25 a second, whatever comes."""
    clock.step = 1 / rate
    with camera(jpegs(2 * rate)) as made:
        watched = Watched(made.url, fps=2, clock=clock)
    for second, passed in watched.frames:
        assert second == pytest.approx(passed, abs=1e-3)
    # The frames that are nearest to these.
    assert watched.seconds == pytest.approx([0, 0.5, 1, 1.5], abs=0.51 / rate)
    assert not watched.notices


@pytest.mark.parametrize("restart", [0.0, 37600.0])
def test_a_stream_whose_clock_jumps_is_not_waited_for(clock: Clock, restart: float) -> None:
    def serve(_number: int, client: socket.socket) -> None:
        # As long as it takes until FFmpeg shows what has come.
        client.sendall(HEAD % b"video/mp2t" + transport_stream(10, 120))
        until(lambda: clock.readings > 8)
        clock.pause(13)
        client.sendall(transport_stream(restart, 10))

    with camera(serve) as made:
        watched = Watched(made.url, fps=5, clock=clock)
    (jump,) = watched.named("source.clock")
    assert jump.data["jump_s"] == pytest.approx(restart - 21.9, abs=0.2)
    burst = watched.seconds[:60]
    assert burst == pytest.approx([i / 5 for i in range(60)])  # it has its own stamps
    # The first one behind the jump is when it came, and the others follow as their stamps do.
    assert watched.seconds[60:] == pytest.approx([13.0, 13.2, 13.4, 13.6, 13.8])
    assert watched.frames[60][1] == 13.0


def test_a_camera_that_comes_back_is_seen_again_and_the_seconds_go_on(clock: Clock) -> None:
    clock.step = 0.1
    with camera(jpegs(7), away_after=1) as made:

        def noticed(notice: Notice) -> None:
            if notice.data.get("attempt") == 2 and notice.type == "source.lost":
                made.come_back()

        watched = Watched(made.url, 5, clock, reconnect=60.0, most=6, noticed=noticed)
    lost, back = watched.named("source.lost"), watched.named("source.back")
    assert [notice.data["attempt"] for notice in lost] == [1, 2]
    assert "Connection refused" in lost[1].data["message"]
    # It waited twice, and looked at the clock when it was refused and when it was there again.
    assert back[0].data["lost_s"] == pytest.approx(0.5 + 1.0 + 2 * clock.step)
    assert watched.seconds == sorted(set(watched.seconds))
    assert watched.seconds[-1] > back[0].data["frame_at"] - 0.01 > 1
    for second, passed in watched.frames:
        assert second == pytest.approx(passed, abs=1e-3)


@pytest.mark.parametrize("reconnect", [0.0, 0.3])
def test_a_camera_that_stays_away_is_given_up(clock: Clock, reconnect: float) -> None:
    clock.step = 0.01
    with camera(jpegs(4), away_after=1) as made:
        watched = Watched(made.url, 5, clock, reconnect)
        tries = [notice.data["attempt"] for notice in watched.named("source.lost")]
        assert tries == ([] if reconnect == 0 else [1])
        assert watched.error.startswith(f"{made.url}: cannot be read: ")


def test_a_server_that_is_not_ready_is_asked_again_and_a_wrong_one_is_not() -> None:
    def serve(number: int, client: socket.socket) -> None:
        if number == 1:
            client.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        elif number == 2:
            jpegs(10)(number, client)
        else:
            client.sendall(b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    said: list[str] = []
    with camera(serve) as made:
        open_source(made.url, 300.0, said.append).close()  # type: ignore[union-attr]
        assert len(said) == 1
        assert "503 Service Unavailable" in said[0] or "5XX" in said[0]
        with pytest.raises(SourceError, match="404 Not Found"):
            open_source(made.url, 300.0, said.append)
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


@contextmanager
def playlists(given: list[str | None]) -> Iterator[str]:
    """The address of a live stream whose playlist is the first one given, then, until there are
    others, the second one; None: it is not found. A segment is of ten pictures."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            if self.path.endswith(".m3u8"):
                playlist = given.pop(0) if len(given) > 1 else given[0]
                if playlist is None:
                    return self.send_error(404)
                body = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n{playlist}".encode()
            else:
                body = transport_stream(float(self.path.strip("/.ts")), 10)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/live.m3u8"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_playlist_that_cannot_be_read_any_more_is_lost_and_one_that_ends_is_not(
    clock: Clock,
) -> None:
    segments = [f"#EXTINF:1.0,\n{i}.ts\n" for i in range(3)]
    going, ended = segments[0] + segments[1], "".join(segments) + "#EXT-X-ENDLIST\n"
    with playlists([going, ended]) as url:
        watched = Watched(url, 1, clock, reconnect=60.0)
    assert watched.seconds == [0, 1, 2]
    assert not watched.notices
    given = [going, None]
    with playlists(given) as url:
        watched = Watched(url, 1, clock, 60.0, noticed=lambda _: given.__setitem__(0, ended))
    assert len(watched.seconds) == 2 + 3
    (lost,) = watched.named("source.lost")
    assert "404 Not Found" in lost.data["message"]
    assert len(watched.named("source.back")) == 1
    assert not watched.error


@pytest.mark.parametrize(
    ("over_tcp", "refusal"),
    [
        (True, "461 Unsupported Transport"),
        (False, "461 Unsupported Transport"),
        (False, "406 Not Acceptable"),
        (False, "400 Bad Request"),
    ],
)
def test_a_camera_may_have_one_transport_of_rtsp_alone(
    clock: Clock, over_tcp: bool, refusal: str
) -> None:
    with camera(rtsp(transport_stream(0, 60), over_tcp, refusal)) as made:
        watched = Watched(made.url.replace("http", "RTSP"), 1, clock, most=3)
    assert watched.seconds == [0, 1, 2]


@pytest.mark.parametrize("sized", [True, False])
def test_a_camera_of_single_pictures_is_asked_for_the_next_one(clock: Clock, sized: bool) -> None:
    with camera(still(sized)) as made:
        watched = Watched(made.url, 2, clock, reconnect=60.0, most=4)
    assert watched.seconds == [0, 0.5, 1, 1.5]
    assert not watched.notices


def test_a_camera_of_single_pictures_that_are_broken_is_lost(clock: Clock) -> None:
    with camera(still(sized=True, broken_after=3)) as made:
        watched = Watched(made.url, 2, clock, reconnect=60.0)
    assert watched.seconds == [0, 0.5]
    assert watched.error.endswith("its picture is broken")
    assert {notice.type for notice in watched.notices} == {"source.lost"}


@pytest.mark.parametrize("form", ["flv", "matroska"])
def test_a_stream_that_begins_with_a_length_is_not_fetched(form: str) -> None:
    """As FFmpeg writes it when it sends a file on: what was made of it may go on for ever."""
    made = io.BytesIO()
    with av.open(made, "w", format=form) as container:
        stream = container.add_stream("mpeg4" if form == "matroska" else "flv1", rate=10)
        for frame in [av.VideoFrame(64, 64, "yuv420p") for _ in range(50)]:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    def serve(_number: int, client: socket.socket) -> None:
        client.sendall(HEAD % b"video/x" + made.getvalue())

    with camera(serve) as server:
        source = open_source(server.url)
        assert isinstance(source, LiveSource)
        source.close()


def test_an_answer_that_comes_late_is_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirections may take longer than the time without an answer that is allowed."""
    clock = itertools.count(step=100)
    monkeypatch.setattr(live, "perf_counter", lambda: next(clock))
    with (
        camera(lambda _, client: client.sendall(b"HTTP/1.0 404 Not Found\r\n\r\n")) as made,
        pytest.raises(SourceError, match="404 Not Found"),
    ):
        open_source(made.url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("http://host:80/a@b?author=me", "http://host:80/a@b?author=me"),
        ("rtsp://admin:a/b@host:554/x", "rtsp://***@host:554/x"),
        ("rtsp://admin:a@[::1]:554/x", "rtsp://***@[::1]:554/x"),
    ],
)
def test_passwords_alone_are_hidden(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


@pytest.mark.parametrize("url", ["rtsp://{}@127.0.0.1:1/x", "http://127.0.0.1:1/x?a=1&pwd={}"])
def test_what_is_said_of_a_source_has_no_password(url: str) -> None:
    with pytest.raises(SourceError, match="Connection refused") as caught:
        open_source(url.format("admin:hunter2"))
    assert "hunter2" not in str(caught.value)
    assert "127.0.0.1:1/x" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("rtmp://127.0.0.1:1/a/b", "Connection refused"),
        ("rtsp://admin:a#b@127.0.0.1:1/x", "write characters such as # .* as %23"),
        ("rtsp://127.0.0.1:70000/x", "ports 65535 at most"),
        ("rtsp://[::1/x", r"IPv6 addresses are in \[ \]"),
        (f"rtsp://{'a' * 70}/x", "aaa: is not the name of a host: label too long"),
        ("srtx://127.0.0.1:1", "srtx:// is not a protocol here"),
        ("rtsp://moss.invalid/x", "moss.invalid: "),
        ("/", "/: is a folder"),
    ],
)
def test_what_is_wrong_with_an_address_is_said(url: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        open_source(url)


def test_a_file_by_its_url_is_a_file(tmp_path: Path) -> None:
    """Served with its length, it has a file's clock: sound first, a last picture that stays."""
    path = video(tmp_path / "a.mp4", every(0.5, 6, 2), sound=5, stays=2)

    def served(data: bytes, sized: bool) -> FileSource:
        length = b"Content-Length: %d\r\n" % len(data) if sized else b""

        def serve(_number: int, client: socket.socket) -> None:
            client.sendall(b"HTTP/1.0 200 OK\r\n" + length + b"\r\n" + data)

        with camera(serve) as made:
            source = open_source(made.url)
        assert isinstance(source, FileSource)
        return source

    fetched = served(path.read_bytes(), sized=True)
    # Of these one alone says that it ends: the file's table of contents, or the server.
    served(path.read_bytes(), sized=False)
    stream = served(transport_stream(0, 30), sized=True)
    assert [second for second, _ in stream.frames(1)] == [0, 1, 2]
    local = open_source(path.as_uri())
    assert isinstance(local, FileSource)
    for source in (fetched, local):
        shown = [(second, number(frame.permute(1, 2, 0))) for second, frame in source.frames(1)]
        assert shown == [(2, 0), (3, 2), (4, 4), (5, 5)]

"""A live source: a camera, a stream on the network, a pipe. It is connected to again when lost."""

from __future__ import annotations

import errno
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, ClassVar
from urllib.parse import urlsplit

import av
from av.format import Flags
from av.video.frame import VideoFrame
from torch import Tensor

from data_pipeline.clock import best_stream
from data_pipeline.stores import without_secrets
from data_pipeline.video import upright_pixels
from inference.live_clock import AHEAD, Grid, LiveClock

_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}
_TIMEOUT = 10.0  # seconds after which a connection that gives nothing counts as dead
_OPENED, _SILENT = 20.0, 60.0  # the same for all of its connections together; a playlist has many
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between two tries; the last one again and again
_BROKEN = 50  # so many broken pictures one after the other are no stream
_HOUR = 3600.0
_STREAMED = ("flv", "matroska")  # may begin with a length that a stream does not keep to
_PLAYLISTS = ("hls", "dash")  # they say where a stream ends; others end because somebody has gone


class SourceError(Exception):
    """A source that cannot be read; the message names it and says what to do."""


@dataclass(frozen=True)
class Notice:
    """What happened to a source: an event's type and its data."""

    type: str
    data: dict[str, Any] = field(default_factory=dict)


class LiveSource:
    """A source that sends frames at its own time: a camera, a stream, a pipe.

    Args:
        name: URL, `pipe:0`, path of a named pipe; of a camera, for messages.
        camera: its number; empty: it is not one.
        piped: it can be read only once.
        reconnect: seconds for which it is tried again once it is lost.
    """

    live: ClassVar[bool] = True

    def __init__(self, name: str, camera: str, piped: bool, reconnect: float) -> None:
        self.name = f"camera {camera}" if camera else without_secrets(name)
        self.whole = False  # whether it turns out to be a file with an end, not a stream
        self.file_size = 0  # its bytes; 0: nobody says
        self._url, self._camera, self._piped, self._reconnect = name, camera, piped, reconnect
        self._still = False  # whether each connection gives one picture, the newest
        self._ends = False  # whether its end is an end, not a loss
        self._stores = False  # whether more of it may be there than is due
        self._ahead = AHEAD
        self._stream: Any = None  # of the connection
        self._frames = self._connection()
        self._frame_wanted = threading.Event()
        self._reader: threading.Thread | None = None
        self._problem: Exception | None = None  # found before anybody wanted a frame

    def connect(self, notify: Callable[[str], None]) -> None:
        """Connects, and waits for the first picture. SourceError.

        A server that is not ready (HTTP 5xx) is asked again, as one that is lost.
        """
        if self._piped:
            return
        began, tries = time.monotonic(), 0
        while not self._answers(began, tries, notify):
            self._frames = self._connection()
            tries += 1

    def skip(self) -> None:
        """Reads and drops pictures in a thread until they are wanted: else those that are sent
        while a model is loaded would be seen, too late."""
        if not self._piped:
            self._reader = threading.Thread(target=self._skip, name="moss-source", daemon=True)
            self._reader.start()

    def close(self) -> None:
        """Ends the connection."""
        self._take_over()
        self._frames.close()

    def frames(
        self, fps: float, pause: Callable[[float], bool]
    ) -> Iterator[tuple[float, Tensor] | Notice]:
        """(second, uint8 [3, H, W]) `fps` times a second, and notices of what happens between.

        `source.lost`, with the number of the try and its time; `source.back`; `source.clock`: the
        source's own clock has jumped. `pause` waits so many seconds; true: nobody waits any more.
        Raises SourceError when it has been away for too long.
        """
        clock, grid = LiveClock(self._ahead), Grid(fps)
        lost, tries = 0.0, 0  # since when; how often it was tried since then
        self._take_over()
        while True:
            try:
                waiting_since = perf_counter()
                for stamp, frame in self._frames:
                    now = time.monotonic()
                    waited = None if self._stores else perf_counter() - waiting_since
                    if tries:
                        clock.restart()
                    second = clock.second(stamp, now, waited)
                    at = round(second, 3)
                    if tries:
                        yield Notice("source.back", {"frame_at": at, "attempt": tries,
                                                     "lost_s": round(now - lost, 3)})  # fmt: skip
                        tries = 0
                    if clock.jump:
                        yield Notice("source.clock", {"frame_at": at, "jump_s": clock.jump})
                    if (chosen := grid.take(second)) is not None:
                        yield round(chosen, 3), upright_pixels(frame, self._stream)
                    waiting_since = perf_counter()
                error: Exception | None = self._problem
            except (av.FFmpegError, OSError) as caught:
                error = caught
            if error is None and self._ends:
                return
            if error is None and self._still:
                if pause(1 / fps):
                    return
                self._frames = self._connection()
                continue
            self._problem, now = None, time.monotonic()
            lost = lost if tries else now
            left = self._reconnect - (now - lost)
            wait = min(_pause(tries), left)
            if left <= 0 or self._piped:
                if error is None:
                    return
                raise self._error(error)
            tries += 1
            words = _words(error) if error else "the stream has ended"
            yield Notice("source.lost", {"message": f"{self.name}: {words}", "attempt": tries,
                                         "retry_s": wait})  # fmt: skip
            if pause(wait):
                return
            self._frames = self._connection()

    def _connection(self) -> Generator[tuple[float | None, VideoFrame]]:
        """One connection's frames, each with its own time stamp in seconds if it has one."""
        with self._open() as container:
            stream = best_stream(container)
            if stream is None:
                raise OSError("it has no video stream")
            self._stream = stream
            bare = self._describe(container)
            broken = 0
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                    broken = 0
                except av.InvalidDataError:
                    broken += 1
                    if broken > _BROKEN:
                        raise
                    continue
                for frame in frames:
                    yield (None if bare else frame.time), frame
                    if self._still:
                        return
            if self._still:  # else it would be asked for pictures for ever
                raise OSError("its picture is broken")
            goes_on = container.format.name.startswith(_PLAYLISTS) and not container.duration
        if goes_on:
            self._ends = self._has_ended()

    def _describe(self, container: av.container.InputContainer) -> bool:
        """Finds out what the connection is: a file, a stream or single pictures. Returns whether
        its frames have no time stamps of their own."""
        form: str = container.format.name
        flags: Any = container.format.flags  # an integer in PyAV 18
        bare = bool(getattr(flags, "value", flags) & Flags.no_timestamps.value)
        fetched = self._url.startswith("http")
        playlist = form.startswith(_PLAYLISTS)
        self._still = fetched and form.endswith("_pipe")
        # What goes on for ever has no length; a camera of pictures may give a made-up one.
        length = max(container.size, 0) if fetched and not (bare or playlist or self._still) else 0
        ends = bool(container.duration or length) and not self._still
        sure = bool(length) or not form.startswith(_STREAMED)
        self.whole, self.file_size = fetched and ends and sure and not playlist, length
        self._ends = self._piped or ends
        self._stores = self._ends or playlist
        if container.duration:
            self._ahead = _HOUR
        # Cameras' stamps may be the time of day, which somebody sets.
        return bare or form.endswith("pipe") or bool(self._camera)

    def _has_ended(self) -> bool:
        """Whether the playlist that gives nothing more says that this is its end: FFmpeg does not
        tell a server that has gone from that. What is wrong with it is raised."""
        with self._open() as container:
            return bool(container.duration)

    def _open(self) -> av.container.InputContainer:
        if not self._camera:
            return self._open_url()
        if sys.platform not in _CAMERAS:
            raise OSError("cameras are read on Linux and macOS only")
        form, device = _CAMERAS[sys.platform]
        return av.open(device.format(self._camera), format=form)

    def _open_url(self) -> av.container.InputContainer:
        if self._piped:
            return av.open(self._url)
        wait = f"{_TIMEOUT * 1e6:.0f}"
        options = {"rw_timeout": wait}
        if not self._url.startswith("rtmp"):  # there it is how long to wait for a client
            options["timeout"] = wait
        if self._url.startswith("rtsp"):
            options["rtsp_flags"] = "prefer_tcp"  # UDP where a camera has nothing else
        began = perf_counter()
        try:
            return self._open_stream(options)
        except (av.FFmpegError, OSError) as error:
            answered = isinstance(error, av.HTTPClientError | av.HTTPServerError)
            if not answered and perf_counter() - began >= _TIMEOUT:
                raise TimeoutError(f"no answer for {_TIMEOUT:g} s") from error
            raise

    def _open_stream(self, options: dict[str, str]) -> av.container.InputContainer:
        try:
            return av.open(self._url, options=options, timeout=(_OPENED, _SILENT))
        except (av.HTTPOtherClientError, av.HTTPBadRequestError):
            if "rtsp_flags" not in options:
                raise
        # By UDP, too, where a camera refuses TCP in other words than FFmpeg expects: 406, 400.
        del options["rtsp_flags"]
        options["rtsp_transport"] = "udp"
        return av.open(self._url, options=options, timeout=(_OPENED, _SILENT))

    def _answers(self, began: float, tries: int, notify: Callable[[str], None]) -> bool:
        """Whether the first picture is there; False after a pause in which a server gets ready."""
        try:
            next(self._frames)
            return True
        except StopIteration:
            raise SourceError(f"{self.name}: cannot be read: it has no picture") from None
        except (av.FFmpegError, OSError) as error:
            left = self._reconnect - (time.monotonic() - began)
            pause = min(_pause(tries), left)
            if left <= 0 or not isinstance(error, av.HTTPServerError):
                raise self._error(error) from None
            notify(f"{self.name}: {_words(error)}; tried again in {pause:g} s")
            time.sleep(pause)
            return False

    def _skip(self) -> None:
        try:
            for _ in self._frames:
                if self._frame_wanted.is_set():
                    return
        except (av.FFmpegError, OSError) as error:
            self._problem = error

    def _take_over(self) -> None:
        self._frame_wanted.set()
        if self._reader:
            self._reader.join()

    def _error(self, error: Exception) -> SourceError:
        return SourceError(
            f"{self.name}: cannot be read: {_hint(self._url, error) or _words(error)}"
        )


def _pause(tries: int) -> float:
    return _PAUSES[min(tries, len(_PAUSES) - 1)]


def _words(error: Exception) -> str:
    if isinstance(error, av.ExitError):
        return f"nothing came for {_SILENT:g} s"
    if isinstance(error, av.InvalidDataError):
        return "what it sends is not a video"
    return str(getattr(error, "strerror", None) or error)


def _hint(url: str, error: Exception) -> str:
    """Why a URL cannot be opened, where FFmpeg does not say it; else ""."""
    scheme, colon, _ = url.partition("://")
    try:
        parts = urlsplit(url if colon else "")
        host, _ = parts.hostname, parts.port
    except ValueError:
        return (
            "no HOST:PORT behind its :// (IPv6 addresses are in [ ], ports 65535 at most): "
            "write characters such as # / : @ of a user name or password as %23 %2F %3A %40"
        )
    if isinstance(error, av.ProtocolNotFoundError):
        return f"{scheme}:// is not a protocol here: try rtsp, rtmp, http, https, tcp or udp"
    if host and getattr(error, "errno", None) == errno.EIO:
        try:
            socket.getaddrinfo(host, None)
        except OSError as unknown:
            return f"{host}: {unknown.strerror or unknown}"
        except UnicodeError as wrong:
            return f"{host}: is not the name of a host: {wrong.__cause__ or wrong}"
    return ""

"""A camera on the network: a real server that sends pictures, breaks off, and comes back."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction

import av
import numpy as np
from PIL import Image

HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: %s\r\n\r\n"
Script = Callable[[int, socket.socket], None]  # (number of the connection, its socket)


class Camera:
    """A server of `serve`, which is called for each connection.

    away_after: with this connection (the first is 1; 0: with none) it ceases to listen, until
        `come_back`.
    """

    def __init__(self, serve: Script, away_after: int) -> None:
        self._serve, self._away_after = serve, away_after
        # It holds the port while nobody listens there: connections are refused, and no other
        # process gets it.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._held.bind(("127.0.0.1", 0))
        self._address = self._held.getsockname()
        self.url = f"http://127.0.0.1:{self._address[1]}/x"
        self._listener = self._listen()
        self._over, self._wanted, self._back = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def come_back(self) -> None:
        """It listens again when this returns."""
        self._wanted.set()
        assert self._back.wait(60)

    def close(self) -> None:
        self._over.set()
        self._wanted.set()
        with suppress(OSError):
            socket.create_connection(self._address).close()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()
        self._listener.close()
        self._held.close()

    def _listen(self) -> socket.socket:
        return socket.create_server(self._address, reuse_port=True)

    def _accept(self) -> None:
        number = 0
        while not self._over.is_set():
            with suppress(OSError):
                client, _ = self._listener.accept()
                with client:
                    number += 1
                    if number == self._away_after:
                        self._listener.close()
                    if client.recv(4096):
                        self._serve(number, client)
            if self._listener.fileno() < 0:
                self._wanted.wait()
                self._listener = self._listen()
                self._back.set()


@contextmanager
def camera(serve: Script, away_after: int = 0) -> Iterator[Camera]:
    made = Camera(serve, away_after)
    try:
        yield made
    finally:
        made.close()


def jpegs(count: int, fps: float = 0.0) -> Script:
    """A camera without time stamps (`multipart/x-mixed-replace`): so many pictures a connection.
    fps: in a second; 0: all at once."""
    out = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(out, "JPEG")
    part = b"--xx\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % out.tell()
    part += out.getvalue() + b"\r\n"

    def serve(_number: int, client: socket.socket) -> None:
        client.sendall(HEAD % b"multipart/x-mixed-replace; boundary=xx")
        began = time.monotonic()
        with suppress(OSError):
            for i in range(count):
                client.sendall(part)
                if fps:
                    time.sleep(max(0.0, began + (i + 1) / fps - time.monotonic()))

    return serve


def transport_stream(first: float, count: int) -> bytes:
    """Pictures with stamps from second `first` on, ten a second."""
    out = io.BytesIO()
    with av.open(out, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 10)
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 5, 0
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 90, np.uint8), format="rgb24")
            frame.pts = round(first * 10) + i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()

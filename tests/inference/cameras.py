"""A camera on the network: a real server that sends pictures, breaks off, and comes back."""

from __future__ import annotations

import io
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from tests.waiting import PATIENCE

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
        assert self._back.wait(PATIENCE)

    def close(self) -> None:
        self._over.set()
        self._wanted.set()
        with suppress(OSError):
            socket.create_connection(self._address).close()
        self._thread.join(PATIENCE)
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


def _picture() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(out, "JPEG")
    return out.getvalue()


def jpegs(count: int, fps: float = 0.0) -> Script:
    """A camera without time stamps (`multipart/x-mixed-replace`): so many pictures a connection.
    fps: in a second; 0: all at once."""
    picture = _picture()
    part = b"--xx\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture)
    part += picture + b"\r\n"

    def serve(_number: int, client: socket.socket) -> None:
        client.sendall(HEAD % b"multipart/x-mixed-replace; boundary=xx")
        began = time.monotonic()
        with suppress(OSError):
            for i in range(count):
                client.sendall(part)
                if fps:
                    time.sleep(max(0.0, began + (i + 1) / fps - time.monotonic()))

    return serve


def still(sized: bool, broken_after: int = 1000) -> Script:
    """A camera that gives its newest picture to each connection, half of it after so many of them.
    sized: it says the length, as nobody must in HTTP/1.0."""
    whole = _picture()

    def serve(number: int, client: socket.socket) -> None:
        picture = whole if number <= broken_after else whole[: len(whole) // 2]
        length = b"\r\nContent-Length: %d" % len(picture) if sized else b""
        client.sendall(HEAD % (b"image/jpeg" + length) + picture)

    return serve


def rtsp(stream: bytes, over_tcp: bool, refusal: str = "461 Unsupported Transport") -> Script:
    """A camera that sends a transport stream in packets of RTP: in its connection, or by UDP
    alone. refusal: of the other way. The request that Camera has read is OPTIONS."""
    description = (
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
        "m=video 0 RTP/AVP 33\r\na=control:track\r\n"
    )
    described = f"Content-Type: application/sdp\r\nContent-Length: {len(description)}\r\n\r\n"

    def serve(_number: int, client: socket.socket) -> None:
        def answer(number: int, more: str = "\r\n", status: str = "200 OK") -> None:
            client.sendall(f"RTSP/1.0 {status}\r\nCSeq: {number}\r\n{more}".encode())

        answer(1)
        port, number = 0, 1
        while True:
            request = client.recv(4096).decode()
            number += 1
            if request.startswith("DESCRIBE"):
                answer(number, described + description)
            elif request.startswith("SETUP"):
                offered = re.search(r"client_port=(\d+)", request)
                port = int(offered[1]) if offered else 0
                if bool(port) == over_tcp:
                    answer(number, status=refusal)
                    continue
                way = f";client_port={port}-{port + 1}" if port else "/TCP;interleaved=0-1"
                answer(number, f"Session: 1\r\nTransport: RTP/AVP{way};unicast\r\n\r\n")
            else:
                answer(number)
                break
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            for i, start in enumerate(range(0, len(stream), 7 * 188)):
                packet = struct.pack("!BBHII", 0x80, 33, i, 0, 1) + stream[start : start + 7 * 188]
                if port:
                    datagrams.sendto(packet, ("127.0.0.1", port))
                else:
                    client.sendall(b"$\0" + struct.pack("!H", len(packet)) + packet)
            client.recv(1)  # until the reader has gone

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

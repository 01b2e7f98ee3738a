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


@contextmanager
def camera(serve: Script, down: tuple[int, float] = (0, 0.0)) -> Iterator[str]:
    """The URL of a server of `serve`, which is called for each connection.

    down: after so many connections it does not listen for so many seconds.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    port, over = listener.getsockname()[1], threading.Event()

    def accept() -> None:
        nonlocal listener
        number = 0
        while not over.is_set():
            with suppress(OSError):
                client, _ = listener.accept()
                with client:
                    number += 1
                    if number == down[0]:
                        listener.close()
                    if client.recv(4096):
                        serve(number, client)
            if number == down[0] and listener.fileno() < 0:
                over.wait(down[1])
                listener = socket.create_server(("127.0.0.1", port))

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/x"
    finally:
        over.set()
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
        listener.close()
        thread.join(timeout=10)
    assert not thread.is_alive()


def jpegs(fps: float, seconds: float) -> Script:
    """A camera without time stamps (`multipart/x-mixed-replace`), each connection so long."""
    out = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(out, "JPEG")
    part = b"--xx\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % out.tell()
    part += out.getvalue() + b"\r\n"

    def serve(_number: int, client: socket.socket) -> None:
        client.sendall(HEAD % b"multipart/x-mixed-replace; boundary=xx")
        began = time.monotonic()
        with suppress(OSError):
            for i in range(int(fps * seconds)):
                client.sendall(part)
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

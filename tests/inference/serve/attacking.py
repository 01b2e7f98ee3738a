"""What the tests of attacks share: limits, requests written by hand, errors in OpenAI's form."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.serve.limits import Limits
from tests.inference.serve.serving import Running, data_url, jpeg, serving
from tests.waiting import PATIENCE, until

LIMITS = Limits(
    decoders=1, media=1, clip_cpu=0.5, pixels=10**7, connections=40, headers=30.0,
    grace=60.0, parked=2, fps=100, frame_bytes=2**21, held=40 * 2**20,
)  # fmt: skip
USER = {"role": "user", "content": "A"}


JSON = {"Content-Type": "application/json"}


def small_engine(export: Path) -> Engine:
    """Of two sessions."""
    return load_engine(export, device="cpu", window=16, max_tokens=512, max_sessions=2)


def attacked(engine: Engine) -> Iterator[Running]:
    """A server whose decoding processes are there."""
    with serving(engine, LIMITS) as running:
        assert ask(running, ("image_url", jpeg())).status_code == 200
        yield running


def free(server: Running) -> None:
    """Ends what a test has left, and sees that nothing is held any more."""
    for live in list(server.hub.sessions.values()):
        live.close("the test is over")
    server.wait(0)
    until(lambda: server.hub.budget.held == 0)


def raw(server: Running, text: str, body: bytes = b"") -> socket.socket:
    """A connection on which a request's head and body are written by hand."""
    host, port = server.host.split(":")
    made = socket.create_connection((host, int(port)), timeout=PATIENCE)
    made.sendall(text.replace("\n", "\r\n").encode() + body)
    return made


def answers(server: Running, request: bytes, *, ends: bool = True) -> list[tuple[int, bytes]]:
    """Status and body of each, up to the end of the connection; or up to the last one's `}`."""
    with raw(server, "", request) as one:
        said = b""
        while ends or not said.endswith(b"}"):
            piece = one.recv(65536)
            if not piece:
                break
            said += piece
    found = []
    for answer in said.split(b"HTTP/1.1 ")[1:]:
        head, _, body = answer.partition(b"\r\n\r\n")
        found.append((int(head[:3]), body))
    return found


def reset(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def ask(server: Running, *parts: tuple[str, bytes | str], **fields: Any) -> httpx.Response:
    media = [
        {"type": kind, kind: {"url": data if isinstance(data, str) else data_url(data, "x/y")}}
        for kind, data in parts
    ]
    content = [*media, {"type": "text", "text": "What?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, **fields}
    return server.post(json=body)


def refused(answer: httpx.Response, status: int, code: str) -> str:
    """The message of an error in OpenAI's form."""
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return str(error["message"])

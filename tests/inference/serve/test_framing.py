"""Requests and WebSockets, byte by byte: what proxies may read in another way, what takes long to
read, and clients that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch import Tensor
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from inference.serve import connections as limited
from inference.serve.limits import Limits
from inference.serve.server import Certificate
from tests.inference.serve.attacking import USER, answers, raw, small_engine
from tests.inference.serve.serving import Running, jpeg, self_signed, serving
from tests.waiting import PATIENCE, received, until

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SENT = 1.0  # seconds in which a client must read
BODY = json.dumps({"messages": [USER], "max_tokens": 1}).encode()
CHUNKED = b"Transfer-Encoding: chunked\r\n"
UPGRADE = b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with serving(small_engine(tiny), Limits(decoders=1, send=SENT)) as running:
        yield running


def post(*headers: bytes, version: bytes = b"1.1") -> bytes:
    head = b"POST /v1/chat/completions HTTP/%s\r\nHost: localhost\r\n" % version
    return head + b"Content-Type: application/json\r\n" + b"".join(headers) + b"\r\n"


def chunks(body: bytes, size: int) -> bytes:
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


TWO_WAYS = {
    "length-and-chunks": post(LENGTH, CHUNKED) + chunks(BODY, 64),
    "chunks-and-no-length": post(b"Content-Length: 0\r\n", CHUNKED) + chunks(BODY, 64),
    "two-lengths": post(LENGTH, b"Content-Length: 3\r\n") + BODY,
    "one-length-twice": post(LENGTH, LENGTH.lower()) + BODY,
    "a-list-of-lengths": post(b"Content-Length: %d, %d\r\n" % (len(BODY), len(BODY))) + BODY,
    "a-signed-length": post(b"Content-Length: +%d\r\n" % len(BODY)) + BODY,
    "a-length-with-space": post(b"Content-Length : %d\r\n" % len(BODY)) + BODY,
    "a-length-on-the-next-line": post(b"Content-Length:\r\n %d\r\n" % len(BODY)) + BODY,
    "chunks-on-the-next-line": post(b"Transfer-Encoding:\r\n\tchunked\r\n") + chunks(BODY, 64),
    "chunks-of-http-1.0": post(CHUNKED, version=b"1.0") + chunks(BODY, 64),
    "chunks-twice": post(CHUNKED, CHUNKED) + chunks(BODY, 64),
    "chunks-of-something": post(b"Transfer-Encoding: gzip, chunked\r\n") + chunks(BODY, 64),
    "chunks-with-a-tab": post(b"Transfer-Encoding: \x0bchunked\r\n") + chunks(BODY, 64),
    "a-line-without-cr": post(b"X-A: b\n", LENGTH) + BODY,
    "an-end-without-cr": post(LENGTH)[:-2] + b"\n" + BODY,
    "a-cr-in-a-line": post(b"X-A: b\rContent-Length: 0\r\n", LENGTH) + BODY,
    "a-zero-byte": post(b"X-A: b\0\r\n", LENGTH) + BODY,
    "another-version": post(LENGTH, version=b"1.2") + BODY,
    "two-hosts": post(b"Host: evil.example\r\n", LENGTH) + BODY,
    "no-host": HEALTH.replace(b"Host: localhost\r\n", b""),
    "a-target-of-another-host": HEALTH.replace(b"/health", b"http://evil.example/health"),
    "a-target-of-another-port": HEALTH.replace(b"/health", b"http://localhost:1/health"),
    "a-websocket-with-a-body": post(UPGRADE, LENGTH) + BODY,
    "a-chunk-of-0x": post(CHUNKED) + b"0x5\r\nhello\r\n0\r\n\r\n",
    "a-chunk-below-zero": post(CHUNKED) + b"-1\r\nhello\r\n0\r\n\r\n",
    "a-chunk-of-nothing": post(CHUNKED) + b"\r\n\r\n0\r\n\r\n",
    "a-chunk-without-end": post(CHUNKED) + b"f" * 21 + b"\r\nhello\r\n0\r\n\r\n",
    "a-chunk-that-is-longer": post(CHUNKED) + b"3\r\nhello\r\n0\r\n\r\n",
    "a-chunk-without-cr": post(CHUNKED) + b"5\nhello\r\n0\r\n\r\n",
    "an-extension-without-cr": post(CHUNKED) + b"5;a\nhello\r\n0\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("request_", TWO_WAYS.values(), ids=TWO_WAYS)
def test_what_others_may_read_in_two_ways_is_refused(server: Running, request_: bytes) -> None:
    """And what follows it is no request."""
    ((status, body),) = answers(server, request_ + HEALTH)
    assert status in (400, 501)
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_a_connection_ends_with_a_request_in_chunks(server: Running) -> None:
    """Where its chunks end is seen by nobody but this server; others go on."""
    for end in (b"", b"GET /a", b"\n" + HEALTH, HEALTH):
        body = chunks(BODY, 64) if end[:1] != b"\n" else chunks(BODY, 64)[:-2]
        ((status, _),) = answers(server, post(CHUNKED) + body + end)
        assert status == 200
    lengths = post(LENGTH) + BODY + post(LENGTH, b"Upgrade: h2c\r\nConnection: Upgrade\r\n") + BODY
    assert [status for status, _ in answers(server, lengths + HEALTH.replace(
        b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))] == [200, 200, 200]  # fmt: skip


def test_a_body_of_tiny_chunks_is_refused(server: Running) -> None:
    """Each takes as long to read as a large one: a megabyte of them held all others for seconds."""
    ((status, body),) = answers(server, post(CHUNKED) + chunks(b"x" * 20_000, 1))
    assert status == 400
    assert "chunks of" in json.loads(body)["error"]["message"]
    spaces = BODY.replace(b" ", b" " * 4000)
    ((status, _),) = answers(server, post(CHUNKED) + chunks(spaces, 8))
    assert status == 200  # as programs write JSON that they make on the way


# WebSockets


def frame(code: int, data: bytes = b"", *, last: bool = True) -> bytes:
    """As a client sends it, of less than 126 bytes."""
    return struct.pack("!BB4x", code | (0x80 if last else 0), 0x80 | len(data)) + data


def upgraded(server: Running, **options: int) -> socket.socket:
    one = socket.socket()
    if "receive" in options:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options["receive"])
    host, port = server.host.split(":")
    one.settimeout(PATIENCE)
    one.connect((host, int(port)))
    key = b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    head = b"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    one.sendall(head + b"Connection: Upgrade\r\n" + key + b"\r\n")
    assert one.recv(12) == b"HTTP/1.1 101"
    return one


def read_all(one: socket.socket, said: bytearray, ends: list[str]) -> None:
    """What comes until the connection ends, and how it does."""
    try:
        while piece := one.recv(65536):
            said += piece
        ends.append("closed")
    except ConnectionResetError:
        ends.append("reset")


@pytest.mark.parametrize(
    "part", [frame(9), frame(10), frame(9, b"x" * 125), frame(0, last=False)],
    ids=["pings", "pongs", "long-pings", "parts-of-a-message"],
)  # fmt: skip
def test_a_flood_of_parts_closes_the_socket(
    server: Running, part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limited, "_GOODBYE", PATIENCE)  # this process may stand still meanwhile
    with upgraded(server) as one:
        one.sendall(frame(1, b"{", last=False) if part[0] == 0 else b"")
        flood, said, ends = part * (2**18 // len(part)), bytearray(), list[str]()
        reader = threading.Thread(target=read_all, args=(one, said, ends))
        reader.start()
        with contextlib.suppress(OSError):
            for _ in range(80):  # longer than what is allowed at once
                one.sendall(flood)
        reader.join()
    assert len(ends) == 1  # the server ends it
    assert b"parts of messages and pings" in said
    until(lambda: not server.hub.sessions)


def test_pings_and_parts_of_messages_are_answered(server: Running) -> None:
    with upgraded(server) as one:
        for number in range(100):
            one.sendall(frame(9, b"%d" % number))
        text = b'{"type": "session.close"}'
        for at in range(len(text)):
            last = at == len(text) - 1
            one.sendall(frame(0 if at else 1, text[at : at + 1], last=last))
        end = b"closed by the client"
        said = received(one, lambda said: end in said.rpartition(b"session.closed")[2])
        assert all(b"\x8a%c%d" % (len(b"%d" % n), n) in said for n in range(100))


def test_who_sends_many_texts_waits_and_no_other(server: Running) -> None:
    """Each of them changes something, and none is wrong. Others get a hundred answers before they
    are taken, each of which therefore does not wait for long."""
    with server.open() as client, httpx.Client(timeout=PATIENCE) as http:
        created = client.until("session.created")
        live = server.hub.sessions[created["session"]["id"]]
        began, count = time.monotonic(), 2000
        text = json.dumps({"type": "session.update", "session": {"temperature": 0.5}}).encode()
        many = b"".join(frame(1, text) for _ in range(count))
        client.socket.socket.sendall(many)
        for _ in range(100):
            assert http.get(f"{server.http}/health").status_code == 200
        assert live.handle.log.last_seq < count
        rate = 2 * server.hub.limits.fps + 8
        until(lambda: live.handle.log.last_seq > 5 * rate)
        done = live.handle.log.last_seq
        assert done < (4 + time.monotonic() - began) * rate + 10
        live.close("the test is over")  # the client's own goodbye would wait behind all of them
        client.rest()  # its goodbye is behind what it has not read
    server.wait(0)


def test_pings_wait_for_messages_that_wait(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's answer comes after what the session has not taken yet."""
    decode, going_on = server.hub.decode, threading.Event()

    async def waiting(data: bytes) -> Tensor:
        while not going_on.is_set():
            await asyncio.sleep(0.01)
        return await decode(data)

    monkeypatch.setattr(server.hub, "decode", waiting)
    monkeypatch.setattr(server.server.config, "ws_ping_interval", 0.2)
    monkeypatch.setattr(server.server.config, "ws_ping_timeout", 5.0)  # for the client's answers
    with server.open() as client:
        client.until("session.created")
        (protocol,) = server.between_turns(lambda: list(of_sockets(server)))
        late = count_calls(monkeypatch, protocol, "keepalive_timeout")
        client.update(source="file", silence_bias=50)
        for second in range(6):
            client.frame(jpeg(), ts=float(second))
        until(lambda: len(late) > 0)
        going_on.set()
        client.until("input_frame.processed", frame_at=5.0)
        client.send("session.close")
        assert client.close_code == 1000


def of_sockets(server: Running) -> Iterator[Any]:
    """Connections that have become WebSockets."""
    for one in server.server.server_state.connections:
        if isinstance(one, WebSocketsSansIOProtocol):
            yield one


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[None]:
    """Has an entry for each call of a method from now on."""
    method, calls = getattr(owner, name), list[None]()

    def counted() -> None:
        calls.append(None)
        method()

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_who_answers_no_ping_though_nothing_waits_has_gone(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.server.config, "ws_ping_interval", 0.2)
    monkeypatch.setattr(server.server.config, "ws_ping_timeout", 0.4)
    with upgraded(server) as one:
        said = b""
        while piece := one.recv(65536):
            said += piece
    assert b"keepalive ping timeout" in said


# Clients that do not read


def connections(server: Running) -> int:
    return len(server.server.server_state.connections)


def test_who_does_not_read_answers_has_no_connection(server: Running) -> None:
    """Whether more of them wait, or the last one is there and the connection is to be closed."""
    host, port = server.host.split(":")
    until(lambda: connections(server) == 0)
    state = server.server.server_state
    document = HEALTH.replace(b"/health", b"/openapi.json")
    last = document.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    for request in (document * 200, document * 20 + last):
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            one.connect((host, int(port)))
            state.total_requests = 0
            one.sendall(request)
            until(lambda: state.total_requests > 0)
            until(lambda: connections(server) == 0)


def test_who_reads_slowly_gets_all(tiny: Path) -> None:
    """Longer than the limit, in which nothing would be read by one who stood still."""
    limit = 4.0
    document = HEALTH.replace(b"/health", b"/openapi.json")
    with (
        serving(small_engine(tiny), Limits(decoders=1, send=limit)) as server,
        socket.socket() as one,
    ):
        size = len(server.get("/openapi.json").content)
        count = 2**22 // size
        # With small buffers between them, each piece that is read lets the server write another.
        listening = server.server.servers[0].sockets[0]
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)  # its connections', too
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        one.settimeout(PATIENCE)
        host, port = server.host.split(":")
        one.connect((host, int(port)))
        one.sendall(document * count)
        began, read = time.monotonic(), 0
        while read < size * count:
            piece = len(one.recv(2**16))
            assert piece > 0, "the server has ended the connection"
            read += piece
            time.sleep(1.5 * limit * 2**14 / (size * count))
        assert time.monotonic() - began > limit


def test_a_session_whose_client_does_not_read_has_no_connection(server: Running) -> None:
    until(lambda: connections(server) == 0 and not server.hub.sessions)
    with upgraded(server, receive=2048):
        until(lambda: len(server.hub.sessions) == 1)
        (live,) = server.hub.sessions.values()
        for _ in range(300):
            live.handle.emit("session.state", state="silent", filler="x" * 100_000)
        until(lambda: connections(server) == 0)
    live.close("the test is over")
    until(lambda: not server.hub.sessions)


# What the system allows


def test_a_certificates_handshake_has_its_time(tiny: Path, tmp_path: Path) -> None:
    certificate = Certificate.of_flags(*self_signed(tmp_path))
    limits = Limits(decoders=1, headers=SENT)
    with serving(small_engine(tiny), limits, certificate=certificate) as server:
        with raw(server, "") as silent, raw(server, "", b"\x16\x03\x01\x02\x00") as slow:
            began = time.monotonic()
            assert silent.recv(1) == slow.recv(1) == b""
            assert time.monotonic() - began < 30  # asyncio's own limit is a minute

        def healthy() -> bool:
            try:
                return server.get("/health", verify=False).status_code == 200
            except httpx.TransportError:  # this thread, too, may have stood still for so long
                return False

        until(healthy)


# Soft and hard limits of open files: those that a process begins with, those that it then has, and
# what it is warned of.
ALLOWED = (
    ((64, 4096), (2560, 4096), ""),
    ((64, 300), (300, 300), "2560 open files"),
    ((3000, 4096), (3000, 4096), ""),
)
# Each in a process of its own, since a lower hard limit stays; they have their imports in common.
ALLOW = """
import os, resource, sys
from inference.serve.limits import Limits
from inference.serve.server import allow_files
for limit in {limits}:
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        allow_files(Limits())
        print(limit, resource.getrlimit(resource.RLIMIT_NOFILE), file=sys.stderr, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_connections_have_files() -> None:
    code = ALLOW.format(limits=[limit for limit, _, _ in ALLOWED])
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    said = run.stderr
    for limit, allowed, words in ALLOWED:
        before, found, said = said.partition(f"{limit} {allowed}\n")
        assert found, run.stderr
        assert words in before
        assert ("open files" in before) == bool(words)

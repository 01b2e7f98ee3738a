"""Clients that misbehave: nothing leaks, nothing grows, others keep their latency."""

from __future__ import annotations

import base64
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.serve.limits import Limits
from tests.inference.serve.serving import Running, jpeg, serving, until

LATE = 0.5  # seconds: how late a well-behaved client's frame may be on a busy machine


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=3)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with serving(engine, Limits(grace=0.4, replay=500, send=0.3)) as running:
        yield running
        until(lambda: not running.hub.sessions)


class Neighbour:
    """A client that behaves: seven frames a second, while something else goes on."""

    def __init__(self, server: Running) -> None:
        self._client, self._over = server.open(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.lags: list[float] = []

    def _watch(self) -> None:
        client = self._client
        client.until("session.created")
        client.update(silence_bias=50)
        number = 0
        while not self._over.wait(0.14):
            client.frame(jpeg(number))
            event = client.until("input_frame.processed")
            self.lags.append((event["lag_ms"] + event["decision_ms"]) / 1000)
            number += 1
        client.send("session.close")
        client.rest()

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()
        assert self.lags
        assert sorted(self.lags)[len(self.lags) // 2] < LATE
        assert not [e for e in self._client.seen if e["type"] in ("error", "input_frame.dropped")]


def test_a_flood_of_frames_is_dropped_and_counted(server: Running) -> None:
    with Neighbour(server), server.open() as client:
        client.until("session.created")
        client.update(silence_bias=50)
        reader = threading.Thread(target=client.rest)
        reader.start()
        picture, sent, end = jpeg(), 0, time.monotonic() + 1.5
        while time.monotonic() < end:
            client.socket.send(picture)
            sent += 1
        client.send("session.close")
        reader.join(timeout=20)
    frames = [e for e in client.seen if e["type"] == "input_frame.processed"]
    dropped = [e for e in client.seen if e["type"] == "input_frame.dropped"]
    lost = sum(e["count"] for e in dropped)
    assert sent > 1000
    waiting = max(e["waiting"] for e in frames)
    assert waiting <= 4
    assert sent - waiting - 1 <= len(frames) + lost <= sent
    assert {e["reason"] for e in dropped} <= {"rate_limited", "queue_full"}
    assert max(e["lag_ms"] for e in frames) < 1000 * 4 * LATE  # it does not grow


def test_a_client_that_does_not_read_loses_its_socket(server: Running) -> None:
    until(lambda: not server.hub.sessions)
    with Neighbour(server):
        quiet = socket.socket()
        quiet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        shake_hands(quiet, server)
        until(lambda: len(server.hub.sessions) == 2)
        live = list(server.hub.sessions.values())[-1]
        live.untouched = False
        for _ in range(300):  # far more than the buffers between them hold
            live.handle.emit("session.state", state="silent", filler="x" * 100_000)
        until(lambda: live.socket is None)
        assert len(live.handle.log.after(0, 10**6)) <= 501
        until(lambda: live.id not in server.hub.sessions)
        quiet.close()
    assert "slow_client" in server.hub.page().decode()


def test_who_has_seen_events_that_are_still_to_come_is_refused(server: Running) -> None:
    """It would not get those that come next."""
    with server.open() as first:
        created = first.until("session.created")
        first.frame(jpeg())
        last = first.until("input_frame.processed")["seq"]
        name = created["session"]["id"]
        with server.open(f"?session={name}&last_seq={last + 1000}") as wrong:
            assert wrong.close_code == 4404
            assert f"last_seq {last + 1000}: the last event of the session is " in (
                wrong.socket.close_reason or ""
            )
        first.update(temperature=0.5)  # the session is still its first client's
        first.until("session.updated")
        first.send("session.close")
        first.until("session.closed")


def test_a_session_waits_for_a_client_that_vanished_and_then_closes(server: Running) -> None:
    client = server.open()
    client.until("session.created")
    client.update(pace=None, silence_bias=-50)
    client.frame(jpeg())
    client.until("response.output_text.delta")
    client.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(client.socket.socket.detach())  # a reset, in the middle of a response
    assert server.hub.runner.sessions == 1
    server.wait(0, seconds=5)
    until(lambda: not server.hub.sessions)


def test_a_thousand_connects_leave_nothing_behind(server: Running) -> None:
    """Most find no place free, and hear so; some leave in the middle of the handshake."""
    before, fds = len(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codes: list[int] = []
    with Neighbour(server):
        for batch in range(20):
            sockets = [socket.socket() for _ in range(50)]
            whole = [(number + batch) % 10 > 0 for number in range(50)]
            for one, all_of_it in zip(sockets, whole, strict=True):
                shake_hands(one, server, all_of_it)
            for one, all_of_it in zip(sockets, whole, strict=True):
                codes += close_code(one) if all_of_it else []
                one.close()
    until(lambda: not server.hub.sessions)
    server.wait(0)
    assert codes.count(1013) > 500
    until(lambda: len(os.listdir("/proc/self/fd")) <= fds + 5)
    until(lambda: len(threading.enumerate()) <= before + 2)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 64 * 1024  # kilobytes
    with server.open() as client:
        assert client.until("session.created")


def shake_hands(one: socket.socket, server: Running, whole: bool = True) -> None:
    """Opens a WebSocket by hand and reads nothing of it."""
    host, port = server.host.split(":")
    one.connect((host, int(port)))
    one.settimeout(5)
    key = base64.b64encode(os.urandom(16)).decode()
    request = (
        f"GET /v1/realtime HTTP/1.1\r\nHost: {server.host}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    one.sendall(request.encode() if whole else request.encode()[:60])


def close_code(one: socket.socket) -> list[int]:
    """The code of the first frame, if that is a close frame."""
    try:
        head, _, rest = one.recv(4096).partition(b"\r\n\r\n")
        rest = rest or (one.recv(4096) if head else b"")
    except TimeoutError:
        return []
    return [struct.unpack(">H", rest[2:4])[0]] if rest[:1] == b"\x88" else []


def test_the_seconds_of_a_live_session_go_on_on_another_socket(server: Running) -> None:
    with server.open() as first:
        created = first.until("session.created")
        first.update(silence_bias=50)
        first.frame(jpeg())
        first.until("input_frame.processed", frame_at=0.0)
        last = first.seen[-1]["seq"]
    time.sleep(0.2)
    with server.open(f"?session={created['session']['id']}&last_seq={last}") as again:
        again.frame(jpeg())
        assert again.until("input_frame.processed")["frame_at"] >= 0.2
        again.frame(jpeg(), ts=30.0)
        again.until("input_frame.processed", frame_at=30.0)
        again.frame(jpeg())
        assert 30 <= again.until("input_frame.processed")["frame_at"] < 40
        again.update(silence_bias=-50, pace=10)
        again.ask("Tell me a story.")
        again.until("response.output_text.delta")
        again.send("session.close")
        types = [event["type"] for event in again.rest()]
    assert types[-4:] == ["response.done", "session.state", "session.metrics", "session.closed"]
    assert types.count("response.created") == types.count("response.done")

"""Clients that misbehave: nothing leaks, nothing grows, others keep their latency."""

from __future__ import annotations

import base64
import json
import math
import os
import resource
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.serve.limits import Limits
from tests.inference.serve.attacking import USER, raw
from tests.inference.serve.serving import CHAT, Running, jpeg, serving, standing_still
from tests.waiting import PATIENCE, until

# How late a well-behaved client's frame may be: so many times as late as when it is alone, in the
# median; and this many seconds on a machine that is fast.
TIMES, LATE = 20, 0.5
FEW = 12  # frames of such a client at least: of fewer the median may be one that stood still


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=3)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with serving(engine, Limits(grace=60.0, replay=500)) as running:
        yield running
        until(lambda: not running.hub.sessions)


@pytest.fixture(scope="module")
def late(server: Running) -> float:
    """Seconds that a frame of a well-behaved client may wait."""
    with Neighbour(server, math.inf) as alone:
        until(lambda: len(alone.lags) > FEW)
    return max(LATE, TIMES * statistics.median(alone.lags))


class Neighbour:
    """A client that behaves: seven frames a second, while something else goes on. late: seconds."""

    def __init__(self, server: Running, late: float) -> None:
        self._client, self._over, self._late = server.open(), threading.Event(), late
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
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        assert self.lags
        assert statistics.median(self.lags) < self._late
        assert not [e for e in self._client.seen if e["type"] in ("error", "input_frame.dropped")]


def test_a_flood_of_frames_is_dropped_and_counted(server: Running, late: float) -> None:
    with Neighbour(server, late) as neighbour, server.open() as client:
        client.until("session.created")
        client.update(silence_bias=50)
        reader = threading.Thread(target=client.rest)
        reader.start()
        picture, sent = jpeg(), 0
        while sent < 2000 or len(neighbour.lags) < FEW:
            client.socket.send(picture)
            sent += 1
        client.send("input_image_buffer.end")  # all that waits is taken in
        reader.join(PATIENCE)
        assert not reader.is_alive()
    frames = [e for e in client.seen if e["type"] == "input_frame.processed"]
    dropped = [e for e in client.seen if e["type"] == "input_frame.dropped"]
    assert len(frames) + sum(e["count"] for e in dropped) == sent
    assert max(e["waiting"] for e in frames) <= 4
    assert {e["reason"] for e in dropped} <= {"rate_limited", "queue_full"}
    last = [e["lag_ms"] for e in frames[len(frames) // 2 :]]
    assert statistics.median(last) < 1000 * 4 * late  # it does not grow


def test_a_client_that_does_not_read_loses_its_socket(engine: Engine, late: float) -> None:
    limits = Limits(grace=0.4, replay=500, send=0.3)
    with serving(engine, limits) as server, Neighbour(server, late) as neighbour:
        until(lambda: len(server.hub.sessions) == 1)
        (other,) = server.hub.sessions
        quiet = socket.socket()
        quiet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        shake_hands(quiet, server)
        until(lambda: len(server.hub.sessions) == 2)
        (live,) = (one for one in list(server.hub.sessions.values()) if one.id != other)
        live.untouched = False
        for _ in range(300):  # far more than the buffers between them hold
            live.handle.emit("session.state", state="silent", filler="x" * 100_000)
        until(lambda: live.socket is None)
        assert len(live.handle.log.after(0, 10**6)) <= 501
        until(lambda: live.id not in server.hub.sessions)
        quiet.close()
        until(lambda: len(neighbour.lags) >= FEW)
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


def test_who_takes_a_session_without_input_over_keeps_it(server: Running) -> None:
    """It ends with its socket, which is the other one now."""
    with server.open() as first:
        created = first.until("session.created")
        with server.open(f"?session={created['session']['id']}&last_seq=0") as second:
            second.until("session.created")
            assert first.close_code == 4409
            second.frame(jpeg())
            second.until("input_frame.processed")
            second.send("session.close")
            second.until("session.closed", reason="closed by the client")


def test_a_session_waits_for_a_client_that_vanished_and_then_closes(engine: Engine) -> None:
    with serving(engine, Limits(grace=0.4)) as server:
        client = server.open()
        created = client.until("session.created")
        live = server.hub.sessions[created["session"]["id"]]
        client.update(pace=None, silence_bias=-50)
        client.frame(jpeg())
        client.until("response.output_text.delta")
        reset = struct.pack("ii", 1, 0)
        client.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        os.close(client.socket.socket.detach())  # in the middle of a response
        until(lambda: live.handle.log.closed)
        assert live.handle.reason == "nobody came back within 0.4 s"
        until(lambda: not server.hub.sessions)
        client.socket.close()  # else its thread would wait for ever


def test_a_thousand_connects_leave_nothing_behind(server: Running, late: float) -> None:
    """Most find no place free, and hear so; some leave in the middle of the handshake."""
    before, fds = len(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codes: list[int] = []
    with Neighbour(server, late) as neighbour:
        for batch in range(20):
            sockets = [socket.socket() for _ in range(50)]
            whole = [(number + batch) % 10 > 0 for number in range(50)]
            for one, all_of_it in zip(sockets, whole, strict=True):
                shake_hands(one, server, all_of_it)
            for one, all_of_it in zip(sockets, whole, strict=True):
                codes += close_code(one) if all_of_it else []
            for one in sockets:
                one.close()
        until(lambda: len(neighbour.lags) >= FEW)
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
    one.settimeout(PATIENCE)
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
        began = time.monotonic()
        again.frame(jpeg(), ts=30.0)
        again.until("input_frame.processed", frame_at=30.0)
        again.frame(jpeg())
        at = again.until("input_frame.processed")["frame_at"]
        assert 30 <= at <= 30 + (time.monotonic() - began) + 0.001  # to milliseconds
        again.update(silence_bias=-50, pace=1)
        again.ask("Tell me a story.")
        again.until("response.output_text.delta")
        again.send("session.close")
        types = [event["type"] for event in again.rest()]
    assert types[-4:] == ["response.done", "session.state", "session.metrics", "session.closed"]
    assert types.count("response.created") == types.count("response.done")


def test_who_leaves_while_a_place_is_made_for_him_ends_nothing(
    server: Running, engine: Engine
) -> None:
    """The engine is at a step; the session that gives up its place afterwards does so all the same,
    and its client comes back to it."""
    names = []
    for _ in range(engine.max_sessions):
        with server.open() as client:
            names.append(client.until("session.created")["session"]["id"])
            client.update(silence_bias=-50, pace=None, max_output_tokens="inf")
            client.ask("Talk.")
            client.until("response.output_text.delta")
        server.wait_left(names[-1])
    with standing_still(engine):
        until(lambda: server.hub.runner.busy > 0)
        body = json.dumps({"messages": [USER], "max_tokens": 2}).encode()
        head = f"POST {CHAT} HTTP/1.1\nHost: {server.host}\nContent-Type: application/json\n"
        asking = raw(server, f"{head}Content-Length: {len(body)}\n\n", body)
        until(lambda: server.hub.sessions[names[0]].parked)
        asking.close()
        until(lambda: server.hub.waiting == 0)
    until(lambda: server.hub.runner.sessions == engine.max_sessions - 1)
    assert server.post(json={"messages": [USER], "max_tokens": 2}).status_code == 200
    for name in names:
        with server.open(f"?session={name}&last_seq=1") as again:
            again.until("response.output_text.delta")
            again.send("session.close")
            assert again.close_code == 1000

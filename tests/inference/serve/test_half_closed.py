"""Clients that have closed their side of a connection: those that still read, and those that have
gone, also behind a tunnel; and those that do not read their answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference.engine.engine import Engine
from inference.serve import answers
from tests.inference.serve.attacking import LIMITS, USER, free, raw, small_engine
from tests.inference.serve.serving import CHAT, Running, serving, standing_still
from tests.waiting import PATIENCE, received, until


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return small_engine(tiny)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with serving(engine, LIMITS) as running:
        yield running


@pytest.fixture(autouse=True)
def _all_free(server: Running) -> Iterator[None]:
    yield
    free(server)


def request(server: Running, more: str = "", **fields: Any) -> bytes:
    body = json.dumps({"messages": [USER], "max_tokens": 400, "ignore_eos": True, **fields})
    head = f"POST {CHAT} HTTP/1.1\nHost: {server.host}\nContent-Type: application/json\n{more}"
    return f"{head}Content-Length: {len(body)}\n\n{body}".replace("\n", "\r\n").encode()


@contextlib.contextmanager
def tunnel(server: Running) -> Iterator[socket.socket]:
    """A connection through a process that passes on bytes, and that a side has closed, as `ssh -L`
    and Docker's proxy do. It has gone when it cannot pass on what the server says."""
    host, port = server.host.split(":")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        mine = socket.create_connection(listening.getsockname(), timeout=PATIENCE)
        inner, _ = listening.accept()
    outer = socket.create_connection((host, int(port)), timeout=PATIENCE)

    def ask() -> None:
        while piece := inner.recv(2**16):
            outer.sendall(piece)
        outer.shutdown(socket.SHUT_WR)

    def answer() -> None:
        with contextlib.suppress(OSError):
            while piece := outer.recv(2**16):
                inner.sendall(piece)
        outer.close()
        inner.close()

    threads = [threading.Thread(target=way) for way in (ask, answer)]
    for one in threads:
        one.start()
    with mine:
        yield mine
    for one in threads:
        one.join(PATIENCE)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tunneled", [False, True])
def test_a_client_that_has_gone_ends_its_answer_while_nothing_is_said(
    server: Running,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
    tunneled: bool,
) -> None:
    monkeypatch.setattr(answers, "QUIET", 2 * PATIENCE)
    with contextlib.ExitStack() as going_on:
        going_on.enter_context(standing_still(engine))
        with tunnel(server) if tunneled else raw(server, "") as client:
            client.sendall(request(server, stream=stream))
            if stream:
                received(client, lambda came: b"assistant" in came)
            server.wait(1)
            (running,) = server.hub.runner._running
        until(lambda: running.closing)


def test_one_that_reads_gets_its_stream_though_nothing_is_said_for_long(
    server: Running, engine: Engine
) -> None:
    with raw(server, "") as client:
        with standing_still(engine):
            client.sendall(request(server, stream=True, max_tokens=4))
            client.shutdown(socket.SHUT_WR)
            came = received(client, lambda came: came.count(b"\r\n:\n\n\r\n") >= 3)
        while piece := client.recv(2**16):
            came += piece
    assert came.endswith(b"0\r\n\r\n")
    assert b"data: [DONE]" in came


def test_a_request_that_can_come_no_further_is_not_waited_for(server: Running) -> None:
    with raw(server, "") as client:
        client.sendall(request(server, max_tokens=4) + request(server)[:-10])
        client.shutdown(socket.SHUT_WR)
        came = b""
        while piece := client.recv(2**16):
            came += piece
    assert came.count(b"HTTP/1.1 200 OK") == 1


@pytest.mark.parametrize("more", ["", "Connection: close\n"])
def test_an_answer_that_is_not_yet_read_is_sent_and_its_connection_counts(
    engine: Engine, more: str
) -> None:
    limits = replace(LIMITS, connections=2, send=PATIENCE)
    with serving(engine, limits) as server, contextlib.ExitStack() as opened:
        listening = server.server.servers[0].sockets[0]
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)  # its connections', too
        host, port = server.host.split(":")
        clients = [opened.enter_context(socket.socket()) for _ in range(2)]
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(PATIENCE)
            client.connect((host, int(port)))
            client.sendall(request(server, more, logprobs=True, top_logprobs=20))
        connections: set[Any] = server.server.server_state.connections

        def answered() -> int:
            return sum(bool(one.cycle and one.cycle.response_complete) for one in connections)

        until(lambda: server.between_turns(answered) == 2)
        assert all(one.transport.get_write_buffer_size() for one in list(connections))
        with pytest.raises(httpx.TransportError):
            server.get("/health")
        for client in clients:
            answer = http.client.HTTPResponse(client)
            answer.begin()
            choice = json.loads(answer.read())["choices"][0]
            assert len(choice["logprobs"]["content"]) == 400

"""Requests, messages and connections that are meant to stop the server, or to get in: over real
sockets. docs/serving.md has the table of attacks and results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference.engine.engine import Engine
from inference.serve.flags import key, parse
from tests.inference.serve.attacking import (
    JSON,
    LIMITS,
    USER,
    ask,
    attacked,
    free,
    raw,
    refused,
    small_engine,
)
from tests.inference.serve.serving import Running, jpeg, serving, standing_still
from tests.waiting import PATIENCE, received, until


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return small_engine(tiny)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    yield from attacked(engine)


@pytest.fixture(autouse=True)
def _all_free(server: Running) -> Iterator[None]:
    yield
    free(server)


# One request


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": ' + b"[" * 5_000_000,
        b'{"stop": [' + b'"a",' * 1_500_000 + b'"a"]}',
        b'{"x": "' + b"\\u0041" * 1_000_000 + b'"}',
        b'{"seed": ' + b"1" * 5_000_000 + b"}",
    ],
    ids=["brackets", "values", "escapes", "digits"],
)
def test_a_large_json_is_refused_before_it_is_parsed(server: Running, body: bytes) -> None:
    pauses: list[float] = []  # seconds that this process has computed: others may take the cores
    watching, over = threading.Event(), threading.Event()

    def watch() -> None:
        with httpx.Client(timeout=PATIENCE) as http:
            while not over.is_set():
                began = time.process_time()
                http.get(f"{server.http}/health")
                pauses.append(time.process_time() - began)
                watching.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert watching.wait(PATIENCE)
    answer = server.post(content=body, headers=JSON)
    over.set()
    watcher.join()
    assert answer.status_code in (400, 413)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert max(pauses) < 1.0


def test_a_socket_takes_no_large_json(server: Running) -> None:
    with server.open() as client:
        client.socket.send('{"type": "session.update", "session": ' + "[" * 10**6)
        assert client.until("error")["code"] == "too_large"
        client.send("session.close")
        client.rest()


def exif(data: bytes) -> bytes:
    """The JPEG with an EXIF block that ends in the middle of an entry."""
    block = b"Exif\0\0MM\0*\0\0\0\x08\0\x20\x01\x12\0\x03"
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


DDS = b"DDS " + struct.pack("<I", 124) + b"\xff" * 208
POISON: list[Any] = [
    '{"type": "\\ud800"}',
    '{"type": "session.update", "session": {"seed": 1%s}}' % ("0" * 400),
    '{"type": "session.update", "session": {"seed": 1%s}}' % ("0" * 5000),
    '{"type": "session.update", "session": {"pace": 1e999}}',
    '{"type": "session.update", "session": {"\\udc00": 1}}',
    '{"type": "session.update", "session": {"instructions": "\\ud800"}}',
    '{"type": "conversation.item.create", "item": {"content": "\\ud800"}}',
    '{"type": "input_image_buffer.append", "image": "\\ud800"}',
    '{"type": "input_image_buffer.append", "ts": 1e308, "prompt": ["\\udfff"]}',
    '{"type": null}', "null", "[]", '"', "", "{" * 3000,
    DDS, b"", b"\xff\xd8\xff", exif(jpeg())[:60], b"GIF89a" + b"\xff" * 40,
]  # fmt: skip


def test_no_message_ends_a_session_without_a_word(server: Running) -> None:
    """Each gets one error event, which is written and can be read again; the session lives."""
    with server.open() as client:
        created = client.until("session.created")
        for message in POISON:
            client.socket.send(message)
            client.update(pace=40)
            kinds = list(iter(lambda: client.next()["type"], "session.updated"))
            assert kinds == ["error"], message
        client.frame(exif(jpeg()))  # shown as it is
        client.until("input_frame.processed")
        last = client.seen[-1]["seq"]
    with server.open(f"?session={created['session']['id']}&last_seq=0") as again:
        seen = [again.next() for _ in range(last)]
        assert seen == client.seen
        again.send("session.close")
        again.rest()


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "\udfff", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "\ud800"}]}]},
        {"messages": [{"role": "user", "content": "x", "\ud800": 1}]},
        {"messages": [USER], "model": "\ud800"},
        {"messages": [USER], "stop": ["\ud800"], "temperature": -1},
        {"messages": [USER], "seed": 10**400},
        {"messages": [USER], "stream_options": {"\ud800": 1}},
        {"messages": [USER], "\ud800": 1},
    ],
    ids=str,
)
def test_wrong_characters_are_an_error_of_the_request(server: Running, fields: Any) -> None:
    body = json.dumps(fields).encode()
    answer = server.post(content=body, headers=JSON)
    assert 400 <= answer.status_code < 500
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_what_the_context_cannot_hold_is_refused(server: Running) -> None:
    """Counted in tokens: a long prompt, a long answer, a question to a session."""
    long = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "No."}]
    answer = ask(server, messages=[*long, *long, USER])
    words = refused(answer, 400, "context_length_exceeded")
    assert "context is 512 tokens" in words
    refused(ask(server, max_tokens=510), 400, "context_length_exceeded")
    assert ask(server, max_tokens=400).status_code == 200
    with server.open() as client:
        client.until("session.created")
        client.ask("word " * 300)
        assert client.until("error")["code"] == "context_length_exceeded"
        client.update(instructions="word " * 300)
        assert client.until("error")["code"] == "context_length_exceeded"
        client.ask("Who?")
        client.until("conversation.item.created")
        client.send("session.close")
        client.rest()


def test_seconds_of_frames_do_not_go_back(server: Running) -> None:
    with server.open() as client:
        client.until("session.created")
        client.update(silence_bias=50)
        client.frame(jpeg(), ts=5.0)
        client.until("input_frame.processed")
        client.frame(jpeg(), ts=4.0)
        assert "before the last frame" in client.until("error")["message"]
        client.frame(jpeg())  # the clock is where it was
        assert client.until("input_frame.processed")["frame_at"] >= 5.0
        client.send("session.close")
        client.rest()


def test_seconds_of_a_file_do_not_go_back_to_before_a_frame_that_had_none(
    server: Running, engine: Engine
) -> None:
    with server.open() as client:
        client.until("session.created")
        client.update(source="file", silence_bias=50)
        client.until("session.updated")
        client.frame(jpeg(), ts=5.0)
        client.frame(jpeg())  # second 6
        client.frame(jpeg(), ts=5.5)
        assert client.until("error")["message"] == "ts: 5.5 is before the last frame, 6.0"
        with standing_still(engine):  # the session does not end before all has been sent
            client.frame(jpeg(), ts=6.0)
            client.send("input_image_buffer.end")
            client.frame(jpeg())  # these are too late
            client.frame(jpeg(), ts=7.0)
            client.ask("And now?")
        told = client.rest()
        frames = [e["frame_at"] for e in told if e["type"] == "input_frame.processed"]
        assert frames == [5.0, 6.0, 6.0]
        assert "conversation.item.created" not in {e["type"] for e in told}


def test_what_comes_too_late_is_named_as_the_client_calls_it(server: Running) -> None:
    with server.open() as client:
        client.until("session.created")
        client.frame(jpeg())
        client.until("input_frame.processed")
        for field, value in (("instructions", "Be brief."), ("source", "file"), ("prompt", "A")):
            client.update(**{field: value})
            error = client.until("error")
            assert error["field"] == f"session.{field}"
            assert error["message"] == f"session.{field}: can be set before the first input only"
        client.send("session.close")
        client.rest()


# Connections


def test_errors_are_forgiven_with_time_and_a_late_cancel_is_none(server: Running) -> None:
    with server.open() as client:
        client.until("session.created")
        for _ in range(60):
            client.send("response.cancel")
            assert client.until("error")["code"] == "nothing_to_cancel"
        for _ in range(30):
            client.socket.send("no json")
            client.until("error")
        time.sleep(4)  # two are forgiven
        for _ in range(3):
            client.socket.send("no json")
            client.until("error")
        client.send("session.close")
        assert client.close_code == 1000


def head(server: Running) -> str:
    """Of a question, but for its end."""
    return (
        f"POST /v1/chat/completions HTTP/1.1\nHost: {server.host}\nContent-Type: application/json\n"
    )


def test_slow_heads_are_cut_off(engine: Engine) -> None:
    with serving(engine, replace(LIMITS, headers=1.0)) as server:
        silent, slow = raw(server, ""), raw(server, head(server))
        assert silent.recv(1) == b""
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while slow.send(b"X-A: b\r\n"):
                assert time.monotonic() - began < PATIENCE
                time.sleep(0.05)
        again = until_answered(server)
        again.sendall(b"GET /health HTTP/1.1\r\n")  # a second request on it, never ended
        assert again.recv(4096) == b""


def until_answered(server: Running) -> socket.socket:
    """A connection on which a request has been answered: this thread may stand still for longer
    than the server waits for one."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        one, answer = raw(server, f"GET /health HTTP/1.1\nHost: {server.host}\n\n"), b""
        with contextlib.suppress(OSError):
            while b"}" not in answer and (piece := one.recv(4096)):
                answer += piece
        if b"200 OK" in answer and b"}" in answer:
            return one
    raise AssertionError("no request is answered")


def test_slow_bodies_are_cut_off(engine: Engine) -> None:
    with serving(engine, replace(LIMITS, body_wall=1.0)) as server:
        body = raw(server, head(server) + "Content-Length: 100\n\n", b'{"mess')
        assert b" 408 " in body.recv(4096)


def test_connections_are_bounded(server: Running) -> None:
    ended = select.poll()  # `select.select` takes no descriptor above 1023
    with contextlib.ExitStack() as sockets:
        for _ in range(60):
            ended.register(sockets.enter_context(raw(server, "")), select.POLLIN)
        until(lambda: len(ended.poll(0)) >= 20)
        assert len(server.between_turns(server.server.server_state.connections.copy)) <= 40
        for _ in range(50):  # those that say nothing keep nobody out
            assert server.get("/health").status_code == 200


def test_connections_with_a_request_are_not_ended_for_others(engine: Engine) -> None:
    with serving(engine, replace(LIMITS, connections=3)) as server, contextlib.ExitStack() as held:
        sockets = [held.enter_context(server.open()) for _ in range(2)]
        unfinished = raw(server, head(server) + "Content-Length: 100\n\n", b'{"mess')
        until(lambda: len(server.between_turns(server.server.server_state.connections.copy)) == 3)
        with pytest.raises(httpx.TransportError):
            server.get("/health")
        for client in sockets:
            client.until("session.created")
            client.send("session.close")
            assert client.close_code == 1000
        unfinished.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_closed_its_side_gets_its_answer(server: Running, stream: bool) -> None:
    body = json.dumps({"messages": [USER], "max_tokens": 4, "stream": stream}).encode()
    request = (head(server) + f"Content-Length: {len(body)}\n\n").replace("\n", "\r\n").encode()
    one = raw(server, "", 2 * (request + body))
    one.shutdown(socket.SHUT_WR)
    came = b""
    while piece := one.recv(2**16):
        came += piece
    assert came.count(b"HTTP/1.1 200 OK") == 2
    assert came.count(b"[DONE]" if stream else b'"choices"') == 2


# Pages of other sites


def test_other_hosts_and_sites_ask_nothing(server: Running) -> None:
    port = server.host.partition(":")[2]
    body = {"messages": [USER], "max_tokens": 1}
    for host, status in (
        (f"evil.example:{port}", 403), (f"localhost:{port}", 200), (f"[::1]:{port}", 200),
        (f"127.0.0.1.evil.example:{port}", 403), ("", 403), (f"10.0.0.7:{port}", 200),
        (f"evil.example@127.0.0.1:{port}", 403), ("localhost:80:80", 403), ("[::1", 403),
    ):  # fmt: skip
        assert server.post(json=body, headers={"Host": host}).status_code == status, host
    refused(server.get("/health", headers={"Host": "evil.example"}), 403, "host")
    site = {"Origin": "https://evil.example"}
    refused(server.post(json=body, headers=site), 403, "origin")
    assert server.post(json=body, headers={"Origin": server.http}).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        headers = {"Content-Type": kind} if kind else {}
        answer = server.post(content=json.dumps(body), headers=headers)
        refused(answer, 415, "unsupported_media_type")
    upgrade = "GET /v1/realtime HTTP/1.1\nHost: evil.example\nUpgrade: websocket\n"
    upgrade += "Connection: Upgrade\nSec-WebSocket-Version: 13\n"
    one = raw(server, upgrade + "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\n\n")
    received(one, lambda said: b"not a name of this server" in said)


def test_names_of_the_server_are_given(engine: Engine) -> None:
    with serving(engine, hosts=["video.example"]) as server:
        headers = {"Host": "Video.Example:8000"}
        assert server.get("/health", headers=headers).status_code == 200


def test_an_empty_key_is_not_a_server_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is empty"):
        key(" ")
    with pytest.raises(argparse.ArgumentTypeError, match="has a line end"):
        key("one\ntwo")
    monkeypatch.setenv("MOSS_API_KEY", "")
    with pytest.raises(SystemExit):
        parse(["--checkpoint", "x"])
    monkeypatch.delenv("MOSS_API_KEY")
    assert parse(["--checkpoint", "x"]).api_key is None


def test_a_key_is_the_same_with_white_space_around_it(engine: Engine) -> None:
    """As an editor, or a secret that is made of a file, leaves it."""
    with serving(engine, LIMITS, key=key("open-sesame\n")) as server:
        for sent, status in (("open-sesame", 200), ("  open-sesame", 200), ("open", 401)):
            found = server.get("/v1/models", headers={"Authorization": f"Bearer {sent}"})
            assert found.status_code == status


def test_the_last_byte_of_a_key_is_no_white_space(engine: Engine) -> None:
    """Half of a letter of UTF-8 is, where bytes are read as Latin-1."""
    with serving(engine, LIMITS, key=key("voilà")) as server:
        sent = {b"Authorization": "Bearer voilà".encode()}
        assert httpx.get(f"{server.http}/v1/models", headers=sent).status_code == 200

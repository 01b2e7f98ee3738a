"""What every route has: HEAD, OPTIONS, headers for pages of other sites; on real sockets."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Scope
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from inference.cli import CommandError
from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.serve.flags import origin as read_origin
from inference.serve.flags import parse
from inference.serve.limits import Limits
from inference.serve.server import is_local, listen, server_config
from tests.inference.serve.serving import Running, serving
from tests.waiting import PATIENCE

MINE, OTHER = "https://mine.example", "https://other.example"
CHAT, REALTIME = "/v1/chat/completions", "/v1/realtime"


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=4, max_tokens=256, max_sessions=2)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    """With a key, and two sites."""
    with serving(engine, key="secret", origins=[MINE, "null"]) as running:
        yield running


class Answer:
    def __init__(self, server: Running, method: str, path: str, body: str | None, **headers: str):
        connection = http.client.HTTPConnection(server.host, timeout=PATIENCE)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            named["Content-Type"] = "application/json"
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        self.status, self.headers, self.body = answer.status, answer.headers, answer.read()
        connection.close()

    @property
    def allowed(self) -> str | None:
        return self.headers["access-control-allow-origin"]


def ask(server: Running, method: str, path: str, body: str | None = None, **headers: str) -> Answer:
    return Answer(server, method, path, body, **headers)


def preflight(server: Running, path: str, method: str, origin: str) -> Answer:
    return ask(
        server, "OPTIONS", path, origin=origin, access_control_request_method=method,
        access_control_request_headers="authorization,content-type,x-stainless-os",
        access_control_request_private_network="true",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "method"), [(CHAT, "POST"), ("/v1/models", "GET"), ("/metrics", "GET"),
                         (CHAT + "/", "POST"), ("/v1/models/moss-video", "GET")],
)  # fmt: skip
def test_a_preflight_needs_no_key(server: Running, path: str, method: str) -> None:
    for origin in (MINE, "null"):
        answer = preflight(server, path, method, origin)
        assert (answer.status, answer.allowed, answer.body) == (204, origin, b"")
        assert method in answer.headers["access-control-allow-methods"].split(", ")
        wanted = answer.headers["access-control-allow-headers"].split(",")
        assert {"authorization", "content-type"} <= set(wanted)
        assert answer.headers["access-control-allow-private-network"] == "true"
        assert answer.headers["vary"] == "Origin"
    refused = preflight(server, path, method, OTHER)
    assert (refused.status, refused.allowed) == (403, None)
    assert "--allow_origin" in json.loads(refused.body)["error"]["message"]


def test_answers_and_errors_carry_the_sites_name(server: Running) -> None:
    key = {"authorization": "Bearer secret"}
    stream = json.dumps({"messages": [{"role": "user", "content": "A"}], "stream": True,
                         "max_tokens": 3})  # fmt: skip
    for method, path, body, headers, status in (
        ("GET", "/v1/models", None, key, 200),
        ("GET", "/v1/models", None, {}, 401),
        ("POST", CHAT, "{", key, 400),
        ("POST", CHAT, stream, key, 200),
        ("POST", CHAT + "/", stream, key, 200),
        ("GET", CHAT, None, key, 405),
        ("GET", "/nothing", None, key, 404),
        ("GET", "/health", None, {}, 200),
    ):
        mine = ask(server, method, path, body, origin=MINE, **headers)
        assert (mine.status, mine.allowed) == (status, MINE), path
        assert ask(server, method, path, body, origin=OTHER, **headers).allowed is None
        assert ask(server, method, path, body, **headers).allowed is None
        if status >= 400:
            assert set(json.loads(mine.body)["error"]) == {"message", "type", "param", "code"}


def test_without_a_site_nothing_is_said(engine: Engine) -> None:
    with serving(engine) as server:
        assert ask(server, "GET", "/v1/models", origin=OTHER).allowed is None
        assert preflight(server, CHAT, "POST", OTHER).status == 403
        own = preflight(server, CHAT, "POST", server.http)
        assert own.status == 204
    with serving(engine, origins=["*"]) as server:
        assert preflight(server, CHAT, "POST", OTHER).allowed == OTHER
        with server.open(origin=OTHER) as client:
            assert client.until("session.created")


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "http://a]b", "//", ""])
def test_what_is_no_address_is_the_origin_of_no_page(server: Running, origin: str) -> None:
    key = {"authorization": "Bearer secret"}
    for answer in (
        ask(server, "POST", CHAT, "{", origin=origin, **key),
        preflight(server, CHAT, "POST", origin),
    ):
        assert answer.status == 403
        assert json.loads(answer.body)["error"]["code"] == "origin"
    header = {"Authorization": "Bearer secret"}
    with server.open(origin=origin or None, additional_headers=header) as client:
        assert client.close_code == 1008 if origin else client.until("session.created")


def test_head_is_get_without_a_body(server: Running) -> None:
    key = {"authorization": "Bearer secret"}
    for path in ("/", "/health", "/v1/models", "/metrics"):
        head, whole = (ask(server, method, path, **key) for method in ("HEAD", "GET"))
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-type"] == whole.headers["content-type"]
        assert whole.body
    assert ask(server, "HEAD", CHAT, **key).status == 405
    for method, path, allowed in (
        ("GET", CHAT, "OPTIONS, POST"), ("PUT", CHAT + "/", "OPTIONS, POST"),
        ("POST", "/health", "GET, HEAD, OPTIONS"),
    ):  # fmt: skip
        wrong = ask(server, method, path, **key)
        assert (wrong.status, wrong.headers["allow"]) == (405, allowed)
    assert ask(server, "HEAD", "/v1/models").status == 401
    options = ask(server, "OPTIONS", "/health")
    assert (options.status, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS")
    assert ask(server, "OPTIONS", "/nothing").status == 404


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/static/page.css"])
def test_the_page_comes_whole(server: Running, path: str) -> None:
    whole = ask(server, "GET", path)
    assert whole.body
    for part in ("bytes=0-5", "bytes=9-1", "items=0-1", "bytes=999999999-", "bytes="):
        answer = ask(server, "GET", path, range=part)
        assert (answer.status, answer.body) == (200, whole.body)


def test_one_model_is_there_by_its_name(server: Running) -> None:
    key = {"authorization": "Bearer secret"}
    assert json.loads(ask(server, "GET", "/v1/models/moss-video", **key).body)["id"] == "moss-video"
    assert ask(server, "GET", "/v1/models/gpt-4o", **key).status == 404


def test_sockets_have_parameters_that_are_known(server: Running) -> None:
    header = {"Authorization": "Bearer secret"}
    for query in ("?sesion=x", "?model=gpt", "?last_seq=1&at=2"):
        with server.open(query, additional_headers=header) as client:
            assert client.close_code == 1008
    with server.open("?model=moss-video", additional_headers=header) as client:
        assert client.until("session.created")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", CHAT),
        ("/moss" + CHAT, CHAT),
        ("/" + CHAT, CHAT),
        ("/v1/realtimes", REALTIME),
        ("/v1/responses", CHAT),
        ("/completions", CHAT),
        ("/nothing", None),
    ],
)
def test_a_path_that_leads_nowhere_is_told_the_one_that_is_meant(
    server: Running, path: str, meant: str | None
) -> None:
    words = f"{meant} is" if meant else "/openapi.json lists them"
    answer = server.post(path, json={}, headers={"Authorization": "Bearer key"})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].endswith(f"{path}: there is no such route: {words}")
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://{server.host}{path}", open_timeout=PATIENCE)
    assert refused.value.response.status_code == 404
    assert json.loads(refused.value.response.body)["error"]["message"].endswith(words)


def test_sessions_and_requests_are_told_apart(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy that passes no Upgrade on makes a request of a session."""
    answer = server.get(REALTIME)
    assert (answer.status_code, answer.headers["Upgrade"]) == (426, "websocket")
    assert "Upgrade: websocket" in answer.json()["error"]["message"]
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://{server.host}{CHAT}", open_timeout=PATIENCE)
    assert f"sessions are at {REALTIME}" in refused.value.response.body.decode()
    # The client's lines are there where a test before this one has asked for all.
    assert not [record for record in caplog.records if record.name != "httpx"]


def test_origins_are_written_as_browsers_write_them() -> None:
    assert read_origin("HTTPS://App.example/") == "https://app.example"
    assert [read_origin(text) for text in ("*", "null")] == ["*", "null"]
    for wrong in ("app.example", "https://app.example/page", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="SCHEME://HOST"):
            read_origin(wrong)


def test_an_address_that_cannot_be_had_is_told_before_a_model_is_loaded() -> None:
    with listen("127.0.0.1", 0) as taken:
        number = taken[0].getsockname()[1]
        with pytest.raises(CommandError, match=f"--port {number}: Address already in use"):
            listen("127.0.0.1", number)
    with pytest.raises(CommandError, match=r"--host no\.such\.host\.invalid"):
        listen("no.such.host.invalid", 8000)
    with pytest.raises(CommandError, match=r"--host a\.\.b --port 8000: label empty or too long"):
        listen("a..b", 8000)
    for mistaken in ("", "*", "127.0.0.1:80", "[::1]:80", "http://127.0.0.1"):
        with pytest.raises(CommandError, match="write an address alone"):
            listen(mistaken, 8000)
    with pytest.raises(SystemExit):
        parse(["--port", "70000"])
    if has_ipv6():
        with pytest.raises(CommandError, match="as fe80::1 is, needs its name: fe80::1%eth0"):
            listen("fe80::1", 0)


def has_ipv6() -> bool:
    """A container may know IPv6 and have no address of it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as tried:
        tried.bind(("::1", 0))
        return socket.has_dualstack_ipv6()
    return False


def test_a_host_is_listened_to_at_all_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_ipv6():
        pytest.skip("this machine has no address of IPv6")

    def reached(host: str, *addresses: str) -> None:
        with listen(host, 0) as sockets:
            number = sockets[0].getsockname()[1]
            for address in addresses:
                socket.create_connection((address, number), 10).close()

    reached("::", "::1", "127.0.0.1")
    reached("[::1]", "::1")
    reached("::ffff:127.0.0.1", "127.0.0.1")
    found = socket.getaddrinfo
    # As most machines have it, in /etc/hosts; the last one is another machine's.
    several = [one for name in ("::1", "127.0.0.1", "192.0.2.1") for one in found(name, 0, type=1)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: several)
    with listen("localhost", 0) as sockets:
        assert [each.getsockname()[0] for each in sockets] == ["::1", "127.0.0.1"]
        assert len({each.getsockname()[1] for each in sockets}) == 1


def test_a_free_port_is_free_at_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system gives one that is free at the first; another program may have it at the next."""
    if not has_ipv6():
        pytest.skip("this machine has no address of IPv6")
    several = [one for name in ("::1", "127.0.0.1") for one in socket.getaddrinfo(name, 0, type=1)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: several)
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports, create = [other.getsockname()[1], 0], socket.create_server

        def given(address: tuple, **options: Any) -> socket.socket:
            name, number, *scope = address
            return create((name, number or ports.pop(0), *scope), **options)

        monkeypatch.setattr(socket, "create_server", given)
        with listen("localhost", 0) as sockets:
            numbers = {each.getsockname()[1] for each in sockets}
            assert (len(sockets), len(numbers), ports) == (2, 1, [])
            assert numbers != {other.getsockname()[1]}


def test_only_addresses_of_this_machine_alone_need_no_key() -> None:
    own = ("localhost", "127.0.0.1", "127.0.0.2", "::1", "[::1]", "::ffff:127.0.0.1")
    assert all(map(is_local, own))
    assert not any(map(is_local, ("0.0.0.0", "::", "::ffff:192.0.2.1", "192.0.2.1", "x.example")))


@pytest.mark.parametrize("proxy", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_proxy_on_this_machine_says_who_asks(proxy: str) -> None:
    """Its address is the last one where a server listens to `::` and is asked by IPv4."""
    asked: list[str] = []

    async def app(scope: Scope, *_: object) -> None:
        asked.append(scope["client"][0])

    config = server_config(app, "::", 0, Limits())
    config.load()
    forwarded = [(b"x-forwarded-for", b"192.0.2.7")]
    for address in (proxy, "192.0.2.1"):
        scope = {"type": "http", "scheme": "http", "client": (address, 1), "headers": forwarded}
        asyncio.run(config.loaded_app(scope, None, None))
    assert asked == ["192.0.2.7", "192.0.2.1"]


def test_a_socket_that_an_ended_server_left_is_taken_and_no_other(tmp_path: Path) -> None:
    path, file = str(tmp_path / "moss.sock"), tmp_path / "notes.txt"
    file.write_text("mine")
    with listen("", 0, path), pytest.raises(CommandError, match="Address already in use"):
        listen("", 0, path)
    with listen("", 0, path) as again:
        assert again[0].getsockname() == path
    with pytest.raises(CommandError, match=f"--unix_socket {file}: Address already in use"):
        listen("", 0, str(file))
    assert file.read_text() == "mine"
    with pytest.raises(CommandError, match="No such file or directory"):
        listen("", 0, str(tmp_path / "gone/moss.sock"))

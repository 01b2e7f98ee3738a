"""Requests whose target is the whole URL: byte by byte, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.serve.limits import Limits
from tests.inference.serve.attacking import answers, raw, small_engine
from tests.inference.serve.serving import Running, serving

UPGRADE = b"Upgrade: websocket\r\nConnection: Upgrade\r\n"


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with serving(small_engine(tiny), Limits(decoders=1)) as running:
        yield running


def test_a_target_may_be_the_whole_url(server: Running) -> None:
    """As proxies send it (RFC 9112, 3.2.2), with any scheme: the path and the query count."""
    closing = b"\r\nConnection: close\r\n\r\n"
    for target, host, status in (
        (b"http://localhost/health", b"localhost", 200),
        (b"HTTPS://LocalHost/health", b"localhost", 200),
        (b"http://127.0.0.1:8123/v1/models?a=b", b"127.0.0.1:8123", 200),
        (b"http://localhost", b"localhost", 200),
        (b"http://localhost?a=b", b"localhost", 200),
        (b"http://localhost/http://localhost/health", b"localhost", 404),
        (b"http://evil.example/health", b"evil.example", 403),
        (b"ftp://localhost/health", b"localhost", 404),
        (b"http://me@localhost/health", b"localhost", 404),
    ):
        ((found, body),) = answers(
            server, b"GET %s HTTP/1.1\r\nHost: %s%s" % (target, host, closing)
        )
        assert found == status, (target, body)
    request = b"GET http://localhost/v1/realtime HTTP/1.1\r\nHost: localhost\r\n" + UPGRADE
    request += b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    with raw(server, "", request) as one:
        assert one.recv(65536).startswith(b"HTTP/1.1 101 ")

"""What a web server answers decides whether it is asked again: dead links are many in real sets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from data_pipeline import files, stores
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError
from data_pipeline.stores import ForbiddenError, GoneError, StoreError

LOST = 0  # in place of a status: the connection ends without an answer


@contextmanager
def server(*answers: int) -> Iterator[tuple[str, list[str]]]:
    """The URL of a file; the server answers with these statuses in turn, then with 200. And the
    requests for its bytes that it got."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = [*answers, 200][min(len(asked), len(answers))]
            asked.append(self.command)
            if status == LOST:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")

        def do_HEAD(self) -> None:  # of many servers for what they send when it is asked for
            self.send_error(405)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/1.jpg", asked
        running.shutdown()


@pytest.mark.parametrize("status", [400, 401, 403, 451])
def test_a_refusal_is_final(status: int) -> None:
    with server(status) as (url, asked):
        with pytest.raises(SampleError, match=f"unreadable_file: 1.jpg: {status}"):
            files.read_bytes(url)
        assert len(asked) == 1
    kind = ForbiddenError if status in (401, 403) else StoreError
    with server(status) as (url, asked):
        with pytest.raises(kind, match=f"{url} .*read: {status}") as caught:
            stores.read(url)
        assert len(asked) == 1
    assert isinstance(caught.value, GoneError) == (status in (401, 403))


@pytest.mark.parametrize("status", [404, 410])
def test_a_file_that_is_not_there_is_missing(status: int) -> None:
    with server(status) as (url, asked):
        with pytest.raises(SampleError, match="missing_file"):
            files.read_bytes(url)
        assert len(asked) == 1
    with server(status) as (url, asked):
        with pytest.raises(GoneError, match=f"{url} does not exist"):
            stores.read(url)
        assert len(asked) == 1


@pytest.mark.parametrize("status", [LOST, 408, 425, 429, 500, 503])
def test_what_may_be_otherwise_later_is_asked_for_again(status: int) -> None:
    with server(status) as (url, _):
        assert files.read_bytes(url) == b"data"
    with server(status) as (url, asked):
        assert stores.read(url) == b"data"
        assert len(asked) == 2


def test_a_server_that_is_not_there_is_not_a_file_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may start anew; what has no address any more is gone."""
    monkeypatch.setattr(files, "_RETRY_AFTER", (0.0,))
    with socket.socket() as taken:  # nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/1.jpg"
        with pytest.raises(SampleError, match=r"unreadable_file: .*Cannot connect"):
            files.read_bytes(url)
        with pytest.raises(StoreError, match=r"tried 2 times: .*Cannot connect") as caught:
            stores.describe(url, retries=1)
        assert not isinstance(caught.value, GoneError)
        with pytest.raises(ShardError, match=f"{url} cannot be read: "), files.open_file(url):
            pass

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(SampleError, match="missing_file"):
        files.read_bytes("http://gone.invalid/1.jpg")


def test_a_file_of_records_is_not_said_to_be_gone_where_its_server_is_busy() -> None:
    for status, said in ((503, "cannot be read: 503"), (404, "does not exist: correct the path")):
        with (
            server(status) as (url, _),
            pytest.raises(ShardError, match=f"{url} {said}"),
            files.open_file(url),
        ):
            pass

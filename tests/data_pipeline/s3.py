"""An S3 server of this machine over real HTTP, which keeps a list of requests and can fail."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import fsspec
import pytest


class Server:
    """`fail[path] = n`: the next n requests for a path get status 500; -1: all of them."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.requests: Counter[str] = Counter()
        self.fail: dict[str, int] = {}

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        path = environ["PATH_INFO"]
        self.requests[f"{environ['REQUEST_METHOD']} {path}"] += 1
        if self.fail.get(path):
            self.fail[path] -= 1
            start("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return self._app(environ, start)


@contextmanager
def s3_server(patch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Its address and keys are in the environment, as a user has them there."""
    pytest.importorskip("moto", reason="the S3 server of the tests is not installed: moto")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'moss-train[s3]'")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            pass

    server = Server(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, server, threaded=True, request_handler=Silent)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{http.server_port}")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test")
    fsspec.config.conf.clear()
    # moto's buckets belong to the process: an earlier server's would be here, too.
    reset = HTTPConnection("127.0.0.1", http.server_port)
    reset.request("POST", "/moto-api/reset")
    assert reset.getresponse().status == 200
    reset.close()
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    try:
        yield server
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        http.shutdown()
        thread.join()

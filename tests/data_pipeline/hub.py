"""A hub of data sets over real HTTP, as far as huggingface_hub's file system asks it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import pytest

_API, _SHA = "/api/datasets/user/set", "a" * 40


@contextmanager
def hub(patch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of its data set `user/set`, by their paths; its address is in fsspec's settings."""
    files: dict[str, bytes] = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, files)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = {"endpoint": f"http://127.0.0.1:{server.server_port}"}
        patch.setitem(fsspec.config.conf, "hf", address)
        yield files
        server.shutdown()


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, files: dict[str, bytes], *rest: Any) -> None:
        self._files = files
        super().__init__(*rest)

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if tree := re.fullmatch(rf"{_API}/tree/\w+/?(.*)", path):
            self._tree(tree[1], "recursive=true" in self.path.lower())
        elif asked := re.fullmatch(r"/datasets/user/set/resolve/\w+/(.*)", path):
            self._file(asked[1])
        elif re.fullmatch(rf"{_API}(/revision/\w+)?", path):
            self._json({"id": "user/set", "sha": _SHA, "siblings": []})
        else:
            self._json({}, 404)

    def _tree(self, folder: str, recursive: bool) -> None:
        found = {}
        for path, data in self._files.items():
            inside = path.removeprefix(f"{folder}/" if folder else "")
            if folder and inside == path:
                continue
            kind, shown, content = "file", path, data
            if "/" in inside and not recursive:
                shown = path[: len(path) - len(inside)] + inside.partition("/")[0]
                kind, content = "directory", b""
            digest = hashlib.sha1(content).hexdigest()
            found[shown] = {"type": kind, "path": shown, "size": len(content), "oid": digest}
        self._json([*found.values()], 200 if found else 404)

    def _file(self, path: str) -> None:
        if path not in self._files:
            self._json({}, 404)
            return
        data, code, headers = self._files[path], 200, {"ETag": '"x"', "X-Repo-Commit": _SHA}
        if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            first, last = int(span[1]), int(span[2])
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, code = data[first : last + 1], 206
        self._send(data, code, headers)

    def _json(self, value: Any, code: int = 200) -> None:
        error = {"X-Error-Code": "EntryNotFound"} if code == 404 else {}
        self._send(json.dumps(value).encode(), code, {"Content-Type": "application/json", **error})

    def _send(self, data: bytes, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

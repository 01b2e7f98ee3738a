"""An OpenAI-compatible server on 127.0.0.1 whose model is tools.bench.teacher, and that fails.

Of the requests a share ends in an error, is refused with Retry-After, hangs, loses its connection,
or gets a reply whose JSON is cut off.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from data_pipeline.synthesis.endpoint import SEEDS
from tools.bench.teacher import Teacher

# How requests fail, and how often in twenty.
_FAILURES = ["500"] * 8 + ["cut"] * 7 + ["429"] * 3 + ["closed", "hang"]


@dataclass
class RequestCounts:
    """Counts of a server: requests in all, by kind, and by the way in which they failed."""

    requests: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)


class ToyEndpoint(ThreadingHTTPServer):
    """failing: share of the requests. hang: seconds that one takes which hangs. refuse: forms of
    `response_format` that are refused. on_request: is given the number of each request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        teacher: Teacher,
        failing: float = 0.0,
        hang: float = 5.0,
        refuse: tuple[str, ...] = (),
        on_request: Callable[[int], None] = lambda number: None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.teacher, self.failing, self.hang, self.refuse = teacher, failing, hang, refuse
        self.on_request = on_request
        self.served = RequestCounts()
        self._tries: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> ToyEndpoint:
        # Client and server may share a process: 5 ms until one lets the other go on are long here.
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(0.0005)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.shutdown()
        self.server_close()
        sys.setswitchinterval(self._interval)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing for a client that has gone, which is no error here."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def count(self, kind: str, question: str) -> str:
        """Counts a request; returns how it is to fail, "" where it is not. A repeated request may
        succeed."""
        with self._lock:
            self.served.requests += 1
            self.served.kinds[kind] += 1
            self._tries[question] += 1
            number, tries = self.served.requests, self._tries[question]
            draws = random.Random(f"{tries}/{question}")
            failure = draws.choice(_FAILURES) if draws.random() < self.failing else ""
            self.served.failures[failure] += 1
        self.on_request(number)
        return failure


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True
    server: ToyEndpoint

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing on the console."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        form = body.get("response_format", {}).get("type", "text")
        if form in self.server.refuse:
            return self._send(400, {"error": {"message": f"response_format {form} is unknown"}})
        kind, data, pictures = _question(body)
        failure = self.server.count(kind, json.dumps([kind, data, len(pictures), body["seed"]]))
        if failure == "hang":
            time.sleep(self.server.hang)
        if failure in ("closed", "hang"):
            self.close_connection = True
            return None
        if failure in ("500", "429"):
            headers = {"Retry-After": "0.05"} if failure == "429" else {}
            return self._send(int(failure), {"error": {"message": "busy"}}, headers)
        try:
            reply = self.server.teacher.reply(kind, data, pictures, str(body["seed"] % SEEDS))
        except KeyError as error:
            return self._send(400, {"error": {"message": f"an unknown picture: {error!s:.60}"}})
        text = json.dumps(reply)
        if failure == "cut":
            text = text[: len(text) // 2]
        read, wrote = 20 * len(pictures) + len(json.dumps(data)) // 4, len(text) // 4 + 1
        return self._send(200, {
            "id": "toy", "object": "chat.completion", "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "length" if failure else "stop",
                         "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": read, "completion_tokens": wrote},
        })  # fmt: skip

    def _send(
        self, status: int, data: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        """Sends an answer in one piece: two would wait for each other."""
        content = json.dumps(data).encode()
        lines = [f"HTTP/1.1 {status} .", "Content-Type: application/json",
                 f"Content-Length: {len(content)}"]  # fmt: skip
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + content)


def _question(body: dict[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """The kind of a request, its data, and the pictures that it shows."""
    content = body["messages"][1]["content"]
    parts: list[dict[str, Any]] = (
        [{"type": "text", "text": text} for text in content.split("\n\n")]
        if isinstance(content, str)
        else content
    )
    texts = [part["text"] for part in parts if part["type"] == "text"]
    data = next(json.loads(text) for text in reversed(texts) if text.startswith("{"))
    pictures = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return _kind(data), data, pictures


def _kind(data: dict[str, Any]) -> str:
    """The kind of a request, by the fields of its data: the schema that names it may not be
    sent."""
    if "role" in data:
        return "write"
    if "instruction" in data:
        return "audit"
    if "now" in data:
        return "say"
    if "question" in data:
        return "same"
    return "confirm" if "scene" in data else "caption"
